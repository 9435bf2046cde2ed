"""Small scenes drawn from numbers: textured shapes on textured backgrounds, antialiased, in batches.

A shape is a signed distance function (negative inside) on coordinates in which it reaches from about -1 to 1; see
Quilez, "2D distance functions". Everything is vectorised over the batch, so that thousands take seconds.
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
    """Five points: fold the angle into one tenth of the turn, then the distance from one edge."""
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
    """Two discs above, a corner below."""
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


def grid(size_px: int) -> tuple[Tensor, Tensor]:
    """Return x and y of the pixel centres, (1, size, size) each, in [-1, 1], y downwards."""
    centres = (torch.arange(size_px, dtype=torch.float32) + 0.5) * 2 / size_px - 1
    return centres.view(1, 1, -1).expand(1, size_px, -1), centres.view(1, -1, 1).expand(1, -1, size_px)


def stripes(x: Tensor, y: Tensor, angle: Tensor, cycles: Tensor, phase: Tensor) -> Tensor:
    """Return waves in [0, 1] across the picture; the parameters are (N,), the result is (N, H, W)."""
    n = angle.view(-1, 1, 1)
    along = x * torch.cos(n) + y * torch.sin(n)
    return 0.5 + 0.5 * torch.sin(math.pi * cycles.view(-1, 1, 1) * along + phase.view(-1, 1, 1))


def cover(shape: str, x: Tensor, y: Tensor, centre: Tensor, radius: Tensor, angle: Tensor, size_px: int) -> Tensor:
    """Return how much of each pixel a shape covers, in [0, 1].

    `centre` (N, 2) and `radius` (N,) are in the coordinates of `grid`, `angle` (N,) in radians; result (N, H, W).
    """
    cx, cy = centre[:, 0].view(-1, 1, 1), centre[:, 1].view(-1, 1, 1)
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    r = radius.view(-1, 1, 1)
    dx, dy = (x - cx) / r, (y - cy) / r
    distance = SHAPES[shape](cos * dx + sin * dy, cos * dy - sin * dx) * r
    return (0.5 - distance * size_px / 2).clamp(0, 1)


def paint(canvas: Tensor, coverage: Tensor, color: Tensor, wave: Tensor, contrast: Tensor) -> Tensor:
    """Lay a coloured, striped layer over a canvas.

    `canvas` (N, 3, H, W) in [0, 1], `coverage` and `wave` (N, H, W), `color` (N, 3), `contrast` (N,).
    """
    shade = 1 - contrast.view(-1, 1, 1, 1) * wave.unsqueeze(1)
    layer = color.view(-1, 3, 1, 1) * shade
    return canvas + coverage.unsqueeze(1) * (layer - canvas)
