"""The evaluation transform of a classifier, and the same resize as a differentiable product of matrices.

Resizing by a separable filter is linear: out = rows @ image @ columns.T for each channel. With the two matrices it can
be differentiated at the cost of two products, for a part of the image only, whatever the image's size.

References:
    Pillow, Resample.c (coefficients; bicubic with a = -0.5, antialiased where it makes smaller).
"""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

CropBox = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
FILTER_RADIUS = {"bilinear": 1.0, "bicubic": 2.0}  # in pixels
FILTERS = tuple(FILTER_RADIUS)
PILLOW_BICUBIC_A = -0.5


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `resize_px`, then crop the central square of `size_px`.

    With `squash` the whole image is resized to a square of `resize_px` first, whatever its aspect ratio. `filter` is
    bilinear or bicubic.
    """

    size_px: int
    resize_px: int
    filter: str = "bicubic"
    squash: bool = False

    def crop_box(self, width: int, height: int) -> CropBox:
        """Return the part of an image that becomes the model's input.

        Args:
            width: Width of the image in pixels.
            height: Height of the image in pixels.

        Returns:
            left, top, right, bottom in pixels of the image.
        """
        short = min(width, height)
        if self.squash:
            resized_w = resized_h = self.resize_px
        else:  # the longer side is cut to a whole number, as torchvision and timm do
            resized_w = self.resize_px if width <= height else int(self.resize_px * width / short)
            resized_h = self.resize_px if height <= width else int(self.resize_px * height / short)
        left, top = (round((side - self.size_px) / 2.0) for side in (resized_w, resized_h))
        x, y = width / resized_w, height / resized_h
        return left * x, top * y, (left + self.size_px) * x, (top + self.size_px) * y

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the model's input for an RGB image of 8 bits: resized and cropped by Pillow, `size_px` square."""
        resampling: Any = getattr(Image.Resampling, self.filter.upper())
        return image.resize((self.size_px, self.size_px), resampling, box=self.crop_box(*image.size))


class _SparseProduct(torch.autograd.Function):
    """matrix @ x for a constant sparse matrix whose transpose is given: autograd has none for CSR."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed @ gradients[0].contiguous(), None, None


class DifferentiableResize:
    """An `EvalTransform` for images of one size, as matrices.

    Attributes:
        region: Left, top, right, bottom, in whole pixels, of the part of the image that the result depends on.
        height_px: Height of the result.
        width_px: Width of the result.
        scale: Pixels of the image per pixel of the result along a side, the geometric mean of both directions.
        is_identity: Whether the result is the region itself.
    """

    def __init__(self, region: tuple[int, int, int, int], rows: Tensor, columns: Tensor, device: torch.device) -> None:
        """Take the matrices to a device.

        Args:
            region: Left, top, right, bottom in whole pixels.
            rows: (result's height, bottom - top), mostly zeros.
            columns: (result's width, right - left), mostly zeros.
            device: Where images will be.
        """
        self.region, self.height_px, self.width_px = region, len(rows), len(columns)
        self.scale = math.sqrt(rows.shape[1] * columns.shape[1] / (len(rows) * len(columns)))
        self.is_identity = all(m.shape[0] == m.shape[1] and m.equal(torch.eye(len(m))) for m in (rows, columns))
        self.rows, self.columns = (_with_transpose(matrix, device) for matrix in (rows, columns))

    def crop(self, image: Tensor) -> Tensor:
        """Return the region (C, h, w) of an image (C, H, W)."""
        left, top, right, bottom = self.region
        return image[:, top:bottom, left:right]

    def __call__(self, region: Tensor) -> Tensor:
        """Resize a region (C, h, w) to the result (C, H, W); differentiable, not clamped to [0, 1]."""
        if self.is_identity:
            return region
        c, h, w = region.shape
        height, width = self.height_px, self.width_px
        flat = region.permute(1, 0, 2).reshape(h, c * w)
        down: Tensor = _SparseProduct.apply(flat, *self.rows)  # type: ignore[no-untyped-call]  # (H, C*w)
        turned = down.view(height, c, w).permute(2, 1, 0).reshape(w, c * height)  # (w, C*H)
        across: Tensor = _SparseProduct.apply(turned, *self.columns)  # type: ignore[no-untyped-call]  # (W, C*H)
        return across.view(width, c, height).permute(1, 2, 0)  # (C, H, W)


def _with_transpose(matrix: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a matrix and its transpose on a device, sparse on a CPU."""
    pair = matrix.to(device), matrix.T.contiguous().to(device)
    if device.type != "cpu":  # mps has no sparse products, and a GPU adds in any order in them
        return pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls CSR beta
        return pair[0].to_sparse_csr(), pair[1].to_sparse_csr()


def build_resize(
    transform: EvalTransform, width: int, height: int, device: torch.device | str = "cpu"
) -> DifferentiableResize:
    """Build the matrices that resize an image as a transform does.

    Args:
        transform: What to imitate.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        device: Where images will be.

    Returns:
        The resize; it differs from Pillow's by the rounding to 8 bits.
    """
    left, top, right, bottom = transform.crop_box(width, height)
    columns, x0, x1 = resize_matrix(width, left, right, transform.size_px, transform.filter)
    rows, y0, y1 = resize_matrix(height, top, bottom, transform.size_px, transform.filter)
    return DifferentiableResize((x0, y0, x1, y1), rows, columns, torch.device(device))


def resize_matrix(count: int, start: float, end: float, size: int, filter_name: str) -> tuple[Tensor, int, int]:
    """Return the matrix that resizes the interval [start, end) of a line of pixels.

    Args:
        count: Pixels of the line.
        start: Start of the interval, in pixels.
        end: End of the interval, in pixels.
        size: S, pixels of the result.
        filter_name: `bilinear` or `bicubic`.

    Returns:
        matrix: float32 (S, last - first), whose rows sum to 1.
        first: the first pixel that it reads.
        last: the one behind the last pixel that it reads.
    """
    scale = (end - start) / size
    stretch = max(1.0, scale)  # wider than one pixel where it makes smaller: antialiased
    radius = FILTER_RADIUS[filter_name] * stretch
    centers = start + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    lows = (centers - radius + 0.5).trunc().clamp(min=0)
    highs = (centers + radius + 0.5).trunc().clamp(max=count)
    first, last = int(lows.min()), int(highs.max())
    pixels = torch.arange(first, last, dtype=torch.float64)
    weights = _filter((pixels + 0.5 - centers[:, None]) / stretch, filter_name)
    weights[(pixels < lows[:, None]) | (pixels >= highs[:, None])] = 0
    return (weights / weights.sum(1, keepdim=True)).float(), first, last


@functools.lru_cache(maxsize=1000)
def cached_resize_matrix(count: int, size: int, filter_name: str) -> Tensor:
    """Return the matrix (size, count) that resizes a whole line of pixels; for lines of which few lengths are used."""
    return resize_matrix(count, 0, count, size, filter_name)[0]


def _filter(x: Tensor, filter_name: str) -> Tensor:
    """Return a filter's value at distances x in pixels."""
    x = x.abs()
    if filter_name == "bilinear":
        return (1 - x).clamp(min=0)
    return torch.where(x < 2, cubic_weight(x, PILLOW_BICUBIC_A), torch.zeros_like(x))


def cubic_weight(distance: Tensor, a: float) -> Tensor:
    """Return the weights of pixels at distances in [0, 2] by cubic convolution with the parameter a (Keys, 1981)."""
    x = distance
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, inner, outer)
