"""Patches in images at any size, angle and place: placed differentiably, and pasted by Pillow.

References:
    Brown et al., 2017, "Adversarial patch", section 2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.ops import sampling
from cvlab.ops.resample import cached_resize_matrix


@dataclass(frozen=True)
class Placement:
    """Where a patch lies in a square image.

    Attributes:
        side: Side of the patch, in parts of the image's side.
        degrees: Rotation, counterclockwise.
        x: Center from the left, in parts of the image's side.
        y: Center from the top.
    """

    side: float
    degrees: float
    x: float
    y: float


def random_placement(uniform: list[float], min_side: float, max_side: float, max_degrees: float) -> Placement:
    """Return the placement of four random numbers in [0, 1); the unrotated patch is inside the image."""
    side = min_side + (max_side - min_side) * uniform[0]
    x, y = (side / 2 + (1 - side) * u for u in uniform[2:4])
    return Placement(side, (2 * uniform[1] - 1) * max_degrees, x, y)


def disk(size: int) -> Tensor:
    """Return the mask (size, size) of the largest disk in a square: 1 inside, 0 outside, smooth at the edge."""
    positions = torch.arange(size) + 0.5 - size / 2
    distances = (positions[:, None] ** 2 + positions**2).sqrt()
    return (size / 2 - distances + 0.5).clamp(0, 1)


def place(images: Tensor, patch: Tensor, mask: Tensor, placements: list[Placement]) -> Tensor:
    """Return images with a patch in each, differentiable by the patch.

    Args:
        images: (N, 3, S, S) in [0, 1].
        patch: (3, P, P) in [0, 1].
        mask: (P, P) in [0, 1], how opaque the patch is.
        placements: N placements.
    """
    layers = torch.cat([patch * mask, mask[None]])[None]
    size = images.shape[-1]
    placed = torch.cat([_place_layers(layers, size, placement) for placement in placements])
    return (images * (1 - placed[:, 3:]) + placed[:, :3]).clamp(0, 1)  # bicubic interpolation overshoots at edges


def _place_layers(layers: Tensor, size: int, placement: Placement) -> Tensor:
    """Resize layers (1, C, P, P) with antialiasing, as Pillow does, then rotate and move them into (1, C, S, S)."""
    side = max(1, round(placement.side * size))
    matrix = cached_resize_matrix(layers.shape[-1], side, "bicubic").to(layers.device)
    resized = matrix @ layers @ matrix.T
    angle = math.radians(placement.degrees)
    cos, sin = math.cos(angle) * size / side, math.sin(angle) * size / side
    x, y = 2 * placement.x - 1, 2 * placement.y - 1
    theta = torch.tensor([[[cos, -sin, sin * y - cos * x], [sin, cos, -sin * x - cos * y]]], device=layers.device)
    grid = F.affine_grid(theta, [1, layers.shape[1], size, size], align_corners=False)
    return sampling.grid_sample(resized, grid, "bicubic")


def paste(image: Image.Image, patch: Image.Image, mask: Image.Image, placement: Placement) -> Image.Image:
    """Return a square image with a patch pasted by Pillow; `mask` is a gray image of the patch's size."""
    side = max(1, round(placement.side * image.width))
    small, small_mask = (
        picture.resize((side, side), Image.Resampling.LANCZOS).rotate(
            placement.degrees, Image.Resampling.BICUBIC, expand=True
        )
        for picture in (patch, mask)
    )
    corner = round(placement.x * image.width - small.width / 2), round(placement.y * image.height - small.height / 2)
    pasted = image.copy()
    pasted.paste(small, corner, small_mask)
    return pasted
