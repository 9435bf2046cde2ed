"""Sampling and padding of images with gradients that are bit-for-bit identical in every run, also on a GPU.

There the backward passes of torch's `grid_sample` and `pad` add the pixels of a gradient with atomic operations, in the
order in which threads arrive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.ops.resample import cached_resize_matrix, cubic_weight

BICUBIC_A = -0.75  # of the cubic convolution in torch's grid_sample


def pad_edges(images: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Repeat the outermost pixels of images (..., H, W), as `torch.nn.functional.pad` does with mode "replicate"."""
    for dim, before, after in ((-1, left, right), (-2, top, bottom)):
        first, last = images.narrow(dim, 0, 1), images.narrow(dim, -1, 1)
        images = torch.cat([first] * before + [images] + [last] * after, dim)
    return images


def grid_sample(images: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros") -> Tensor:
    """Sample images at the points of a grid, as `torch.nn.functional.grid_sample` does with `align_corners=False`.

    Args:
        images: (N, C, H, W).
        grid: (N, H', W', 2), x and y from -1, the outer edge of the first pixel, to 1. It gets no gradient on a GPU.
        mode: "bilinear" or "bicubic".
        padding_mode: "zeros", or with bilinear "reflection".

    Returns:
        images (N, C, H', W').
    """
    if not images.is_cuda:
        return F.grid_sample(images, grid, mode=mode, padding_mode=padding_mode, align_corners=False)
    return sample_by_index(images, grid, mode, padding_mode)


def upsample_bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge images (N, C, H, W) to a height and a width, as `interpolate` does with `align_corners=False`."""
    if not images.is_cuda:
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return upsample_by_matrices(images, size)


def upsample_by_matrices(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge images by a product with a matrix for each direction, see `upsample_bilinear`."""
    rows, columns = (
        cached_resize_matrix(before, after, "bilinear").to(images)
        for before, after in zip(images.shape[2:], size, strict=True)
    )
    return rows @ images @ columns.T


def sample_by_index(images: Tensor, grid: Tensor, mode: str, padding_mode: str) -> Tensor:
    """Sample images by indexing, whose backward pass sorts the pixels before it adds them; see `grid_sample`."""
    n, _, height, width = images.shape
    columns, x_weights = _taps(grid[..., 0].detach(), width, mode, padding_mode)  # (K, N, H', W')
    rows, y_weights = _taps(grid[..., 1].detach(), height, mode, padding_mode)
    image = torch.arange(n, device=images.device).view(n, 1, 1)
    pixels = images.permute(0, 2, 3, 1)[image, rows[:, None], columns[None]]  # (K, K, N, H', W', C)
    weights = (y_weights[:, None] * x_weights[None]).to(images.dtype)
    return (pixels * weights[..., None]).sum((0, 1)).permute(0, 3, 1, 2)


def _taps(coordinates: Tensor, size: int, mode: str, padding_mode: str) -> tuple[Tensor, Tensor]:
    """Return the pixels along one direction that each point depends on, and their weights, 0 outside of the image.

    Args:
        coordinates: (N, H', W') in [-1, 1] inside of the image.
        size: Pixels of the image in this direction.
        mode: "bilinear" for two pixels or "bicubic" for four.
        padding_mode: "zeros" or "reflection".

    Returns:
        int64 (K, N, H', W') in [0, size), and weights of the same shape.
    """
    position = ((coordinates + 1) * size - 1) / 2
    if padding_mode == "reflection":  # at the outer edges of the first and the last pixel
        distance = (position + 0.5).remainder(2 * size)
        position = (torch.where(distance > size, 2 * size - distance, distance) - 0.5).clamp(0, size - 1)
    low = position.floor()
    t = position - low
    if mode == "bilinear":
        weights = torch.stack([1 - t, t])
        taps = torch.stack([low, low + 1])
    else:
        weights = cubic_weight(torch.stack([t + 1, t, 1 - t, 2 - t]), BICUBIC_A)
        taps = torch.stack([low - 1, low, low + 1, low + 2])
    is_inside = (taps >= 0) & (taps < size)
    return taps.clamp(0, size - 1).long(), weights * is_inside
