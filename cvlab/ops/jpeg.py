"""JPEG compression as a differentiable function of the pixels: what Pillow's encoder and decoder do, in tensors.

References:
    Wallace, 1992, "The JPEG still picture compression standard".
    Bengio et al., 2013, "Estimating or propagating gradients through stochastic neurons" (straight-through estimator).
    libjpeg-turbo: jccolor.c, jcsample.c (h2v2), jdsample.c (fancy upsampling), jdcolor.c.

Differences from libjpeg-turbo:
    The cosine transform is computed in floating point, so that a coefficient on the boundary between two levels may be
    rounded to the other one. Entropy coding loses nothing and is left out.
"""

import functools
import io
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.ops import sampling

BLOCK_PX = 8
MAX_UINT8 = 255
YCC_FROM_RGB = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
RGB_FROM_YCC = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def round_through(x: Tensor) -> Tensor:
    """Round; the gradient is that of the identity."""
    return x + (x.round() - x).detach()


def compress(image: Image.Image, quality: int) -> Image.Image:
    """Return an RGB or gray image as it is after Pillow has written it as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert(image.mode)


def differentiable_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Return images as they are after JPEG compression by Pillow, with 4:2:0 chroma subsampling.

    Rounding passes gradients on as they are.

    Args:
        pixels: (N, 3, H, W) in [0, 1]; they are rounded to 8 bits first.
        quality: 1 to 100, as Pillow's `save` takes it.

    Returns:
        (N, 3, H, W) in [0, 1], multiples of 1/255.
    """
    height, width = pixels.shape[2:]
    rgb = round_through(pixels * MAX_UINT8)
    rgb = sampling.pad_edges(rgb, 0, -width % (2 * BLOCK_PX), 0, -height % (2 * BLOCK_PX))
    luma, chroma = _ycc_from_rgb(rgb).split((1, 2), 1)
    luma_table, chroma_table = (table.to(pixels.device) for table in _quantization_tables(quality))
    luma = _quantize_blocks(luma, luma_table)[..., :height, :width]
    small = _quantize_blocks(_downsample(chroma), chroma_table)[..., : -(-height // 2), : -(-width // 2)]
    chroma = _upsample(small)[..., :height, :width]
    rgb = _rgb_from_ycc(torch.cat([luma, chroma], 1))
    return rgb.clamp(0, MAX_UINT8) / MAX_UINT8


def _ycc_from_rgb(rgb: Tensor) -> Tensor:
    """Convert (N, 3, H, W) to Y, Cb, Cr, all in 0 .. 255; chroma around 128."""
    matrix = torch.tensor(YCC_FROM_RGB, device=rgb.device)
    offset = torch.tensor((0.0, 128.0, 128.0), device=rgb.device).view(3, 1, 1)
    return round_through(torch.einsum("kc,nchw->nkhw", matrix, rgb) + offset)


def _rgb_from_ycc(ycc: Tensor) -> Tensor:
    matrix = torch.tensor(RGB_FROM_YCC, device=ycc.device)
    offset = torch.tensor((0.0, 128.0, 128.0), device=ycc.device).view(3, 1, 1)
    return round_through(torch.einsum("ck,nkhw->nchw", matrix, ycc - offset))


def _downsample(chroma: Tensor) -> Tensor:
    """Average blocks of 2 x 2 pixels; halves are rounded down in even columns and up in odd ones."""
    means = F.avg_pool2d(chroma, 2)
    bias = torch.tensor((-0.125, 0.125), device=chroma.device).repeat(means.shape[3] // 2)
    return means + ((means + bias).round() - means).detach()


def _upsample(chroma: Tensor) -> Tensor:
    """Double both sides: 3/4 of the nearest pixel and 1/4 of the next one, in each direction."""
    n, c, h, w = chroma.shape
    padded = sampling.pad_edges(chroma, 1, 1, 1, 1)
    center = 3 * padded[:, :, 1:-1]
    rows = torch.stack([center + padded[:, :, :-2], center + padded[:, :, 2:]], 3).view(n, c, 2 * h, w + 2)
    center = 3 * rows[..., 1:-1]
    # 8 / 16 and 7 / 16 before the digits are cut off: halves are rounded up in even columns, down in odd ones
    left = (center + rows[..., :-2] + 8) / 16
    right = (center + rows[..., 2:] + 7) / 16
    columns = torch.stack([left, right], 4).view(n, c, 2 * h, 2 * w)
    exact = columns - 0.5
    return exact + (columns.floor() - exact).detach()


def _quantize_blocks(channels: Tensor, table: Tensor) -> Tensor:
    """Round the cosine transform of each block of 8 x 8 pixels to multiples of a table (8, 8), and transform back."""
    n, c, h, w = channels.shape
    cosines = _cosines().to(channels.device)
    blocks = channels.view(n, c, h // BLOCK_PX, BLOCK_PX, w // BLOCK_PX, BLOCK_PX).transpose(3, 4) - 128
    coefficients = cosines @ blocks @ cosines.T
    # The integer transform has steps of 1/8, so that a little less than a half becomes one.
    levels = round_through(coefficients * BLOCK_PX) / BLOCK_PX / table
    rounded = levels.sign() * (levels.abs() + 0.5).floor()  # halves away from 0: a brightness is often one
    levels = levels + (rounded - levels).detach()
    restored = cosines.T @ (levels * table) @ cosines + 128
    restored = round_through(restored.transpose(3, 4).reshape(n, c, h, w))
    return restored + (restored.clamp(0, MAX_UINT8) - restored).detach()


@functools.cache
def _cosines() -> Tensor:
    """Return the orthonormal cosine transform of 8 pixels, (frequencies, pixels)."""
    k = torch.arange(BLOCK_PX, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * k + 1) * k[:, None] / (2 * BLOCK_PX)) * math.sqrt(2 / BLOCK_PX)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


@functools.cache
def _quantization_tables(quality: int) -> tuple[Tensor, Tensor]:
    """Return the tables (8, 8) of luma and chroma that Pillow writes at a quality."""
    buffer = io.BytesIO()
    Image.new("RGB", (BLOCK_PX, BLOCK_PX)).save(buffer, format="JPEG", quality=quality)
    tables = Image.open(io.BytesIO(buffer.getvalue())).quantization  # type: ignore[attr-defined]
    luma, chroma = (torch.tensor(tables[k], dtype=torch.float32).view(BLOCK_PX, BLOCK_PX) for k in (0, 1))
    return luma, chroma
