"""Which part of a photo a model sees, and the same resize twice: by Pillow on 8 bits, and as two matrices.

Resizing by a separable filter is linear: out = rows @ photo @ columns.T for each channel. With the two matrices it can
be differentiated at the cost of two products, for a part of the photo only, whatever the photo's size.
Source: the coefficients of Pillow's Resample.c (bicubic with a = -0.5, antialiased where it makes smaller).
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

CropBox = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the photo
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


@dataclass(frozen=True)
class EvalTransform:
    """What a model sees: the shorter side resized to `resize_px`, then the middle `size_px` square.

    With `squash` the whole photo is resized to `resize_px` square first, whatever its shape.
    """

    size_px: int
    resize_px: int
    filter: str = "bicubic"
    squash: bool = False

    def crop_box(self, width: int, height: int) -> CropBox:
        """Return the part of a photo of `width` x `height` pixels that becomes the picture for the model."""
        short = min(width, height)
        if self.squash:
            resized_w = resized_h = self.resize_px
        else:  # the longer side is cut to a whole number, as torchvision and timm do
            resized_w = self.resize_px if width <= height else int(self.resize_px * width / short)
            resized_h = self.resize_px if height <= width else int(self.resize_px * height / short)
        left, top = (round((side - self.size_px) / 2.0) for side in (resized_w, resized_h))
        x, y = width / resized_w, height / resized_h
        return left * x, top * y, (left + self.size_px) * x, (top + self.size_px) * y

    def __call__(self, photo: Image.Image) -> Image.Image:
        """Return what the model sees of an RGB photo, 8 bits, `size_px` square: resized and cut by Pillow."""
        kind: Any = getattr(Image.Resampling, self.filter.upper())
        return photo.resize((self.size_px, self.size_px), kind, box=self.crop_box(*photo.size))


class _Product(torch.autograd.Function):
    """matrix @ x for a constant sparse matrix whose transpose is at hand: autograd has none for CSR."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed @ gradients[0].contiguous(), None, None


class DifferentiableResize:
    """The same as matrices: a photo's `region` (left, top, right, bottom in whole pixels) and how it is resized.

    `rows`: (S, bottom - top), `columns`: (S, right - left); both are sparse, for each pixel is made from a few. `scale`
    is how many pixels of the photo make one of the model's picture along a side (geometric mean of both).
    """

    def __init__(self, region: tuple[int, int, int, int], rows: Tensor, columns: Tensor, device: torch.device) -> None:
        self.region, self.size_px = region, len(rows)
        self.scale = math.sqrt(rows.shape[1] * columns.shape[1]) / self.size_px
        same = torch.eye(self.size_px)
        self.is_identity = all(matrix.shape == same.shape and matrix.equal(same) for matrix in (rows, columns))
        self.rows, self.columns = (_pair(matrix, device) for matrix in (rows, columns))

    def crop(self, photo: Tensor) -> Tensor:
        """Return the region of a photo (C, H, W)."""
        left, top, right, bottom = self.region
        return photo[:, top:bottom, left:right]

    def __call__(self, region: Tensor) -> Tensor:
        """Resize a region (C, h, w) to (C, S, S); differentiable, not clamped."""
        if self.is_identity:
            return region
        c, h, w = region.shape
        s = self.size_px
        flat = region.permute(1, 0, 2).reshape(h, c * w)
        down: Tensor = _Product.apply(flat, *self.rows)  # type: ignore[no-untyped-call]  # (S, C*w)
        turned = down.view(s, c, w).permute(2, 1, 0).reshape(w, c * s)  # (w, C*S)
        across: Tensor = _Product.apply(turned, *self.columns)  # type: ignore[no-untyped-call]  # (S, C*S)
        return across.view(s, c, s).permute(1, 2, 0)  # (C, S, S)


def _pair(matrix: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a matrix and its transpose on a device, sparse where it has sparse products."""
    both = matrix.to(device), matrix.T.contiguous().to(device)
    if device.type == "mps":
        return both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls CSR beta
        return both[0].to_sparse_csr(), both[1].to_sparse_csr()


def build_resize(
    frame: EvalTransform, width: int, height: int, device: torch.device | str = "cpu"
) -> DifferentiableResize:
    """Build the matrices that resize a photo of `width` x `height` pixels as `frame.view` does."""
    left, top, right, bottom = frame.crop_box(width, height)
    columns, x0, x1 = resize_matrix(width, left, right, frame.size_px, frame.filter)
    rows, y0, y1 = resize_matrix(height, top, bottom, frame.size_px, frame.filter)
    return DifferentiableResize((x0, y0, x1, y1), rows, columns, torch.device(device))


def resize_matrix(count: int, start: float, end: float, size: int, filter_name: str) -> tuple[Tensor, int, int]:
    """Return the matrix that resizes [start, end) of `count` pixels to `size` of them, and which pixels it reads.

    The matrix is float32 (size, last - first), for the pixels from `first` up to `last`.
    """
    scale = (end - start) / size
    stretch = max(1.0, scale)  # wider than one pixel where it makes smaller: antialiased
    support = SUPPORT[filter_name] * stretch
    centers = start + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    lows = (centers - support + 0.5).trunc().clamp(min=0)
    highs = (centers + support + 0.5).trunc().clamp(max=count)
    first, last = int(lows.min()), int(highs.max())
    pixels = torch.arange(first, last, dtype=torch.float64)
    weights = _kernel((pixels + 0.5 - centers[:, None]) / stretch, filter_name)
    weights[(pixels < lows[:, None]) | (pixels >= highs[:, None])] = 0
    return (weights / weights.sum(1, keepdim=True)).float(), first, last


def _kernel(x: Tensor, filter_name: str) -> Tensor:
    x = x.abs()
    if filter_name == "bilinear":
        return (1 - x).clamp(min=0)
    a = -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))
