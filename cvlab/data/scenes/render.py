"""Render batches of textured, antialiased shapes from parameters.

A shape is a signed distance function (negative inside) on coordinates in which it extends from about -1 to 1; see
Quilez, "2D distance functions". Everything is vectorized over the batch, so that thousands take seconds.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

COLORS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "yellow": (0.9, 0.8, 0.15),
    "purple": (0.55, 0.2, 0.7),
    "orange": (0.95, 0.5, 0.1),
    "white": (0.92, 0.92, 0.92),
    "black": (0.08, 0.08, 0.08),
}


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.24


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.8, 0.8)


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 1.0, 0.36)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = 0.866 * x.abs() - 0.5 * y
    return torch.maximum(slope - 0.5, y - 0.8)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (1.3 * x.abs() + 0.9 * y.abs() - 0.95) / 1.58


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance from a star of five points: fold the angle into a tenth of the circle, use one edge."""
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(x, y)
    px, py = radius * torch.cos(folded), radius * torch.sin(folded)
    inner_x, inner_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    edge_x, edge_y = inner_x - 1.0, inner_y
    length = math.hypot(edge_x, edge_y)
    return ((px - 1.0) * edge_y - py * edge_x) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance from two discs above a corner."""
    ax, v = x.abs(), -y
    lobes = torch.hypot(ax - 0.42, v - 0.35) - 0.5
    corner = torch.maximum(0.74 * ax - 0.67 * v - 0.576, v - 0.1)
    return torch.minimum(lobes, corner)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.72 - torch.hypot(x - 0.42, y))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "bar": _bar,
    "triangle": _triangle,
    "diamond": _diamond,
    "plus": _plus,
    "star": _star,
    "heart": _heart,
    "crescent": _crescent,
}


def pixel_grid(size_px: int) -> tuple[Tensor, Tensor]:
    """Return x and y of the pixel centers of a square image, (1, size_px, size_px) each, in [-1, 1], y downwards."""
    centers = (torch.arange(size_px, dtype=torch.float32) + 0.5) * 2 / size_px - 1
    return centers.view(1, 1, -1).expand(1, size_px, -1), centers.view(1, -1, 1).expand(1, -1, size_px)


def stripes(x: Tensor, y: Tensor, angle: Tensor, cycles: Tensor, phase: Tensor) -> Tensor:
    """Return sinusoidal stripes.

    Args:
        x: Coordinates of the pixels (1, H, W).
        y: The same.
        angle: Direction of the wave (N,), in radians.
        cycles: Periods across the image (N,).
        phase: In radians (N,).

    Returns:
        (N, H, W) in [0, 1].
    """
    angle = angle.view(-1, 1, 1)
    along = x * torch.cos(angle) + y * torch.sin(angle)
    return 0.5 + 0.5 * torch.sin(math.pi * cycles.view(-1, 1, 1) * along + phase.view(-1, 1, 1))


def shape_coverage(
    shape: str, x: Tensor, y: Tensor, center: Tensor, radius: Tensor, angle: Tensor, size_px: int
) -> Tensor:
    """Return how much of each pixel a shape covers (antialiasing).

    Args:
        shape: A key of `SHAPES`.
        x: Coordinates of the pixel centers (1, H, W), as `pixel_grid` returns them.
        y: The same.
        center: (N, 2) in the same coordinates.
        radius: (N,) in the same coordinates.
        angle: Rotation (N,), in radians.
        size_px: Width of the whole image, which gives the size of a pixel.

    Returns:
        (N, H, W) in [0, 1].
    """
    cx, cy = center[:, 0].view(-1, 1, 1), center[:, 1].view(-1, 1, 1)
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    r = radius.view(-1, 1, 1)
    dx, dy = (x - cx) / r, (y - cy) / r
    distance = SHAPES[shape](cos * dx + sin * dy, cos * dy - sin * dx) * r
    return (0.5 - distance * size_px / 2).clamp(0, 1)


def blend(canvas: Tensor, coverage: Tensor, color: Tensor, texture: Tensor, contrast: Tensor) -> Tensor:
    """Alpha-blend a textured layer over a canvas.

    Args:
        canvas: (N, 3, H, W) in [0, 1].
        coverage: Opacity of the layer (N, H, W) in [0, 1].
        color: (N, 3) in [0, 1].
        texture: (N, H, W) in [0, 1], which darkens the color.
        contrast: How much it darkens it, (N,).

    Returns:
        The blended canvas (N, 3, H, W).
    """
    shade = 1 - contrast.view(-1, 1, 1, 1) * texture.unsqueeze(1)
    layer = color.view(-1, 3, 1, 1) * shade
    return canvas + coverage.unsqueeze(1) * (layer - canvas)
