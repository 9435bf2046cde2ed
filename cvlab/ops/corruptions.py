"""Common corruptions of images at five severities, to measure how robust a classifier is against them.

References:
    Hendrycks and Dietterich, 2019, "Benchmarking neural network robustness to common corruptions and perturbations":
    the strengths are those of its CIFAR-10-C for small images and of its ImageNet-C for others.

Differences from the paper:
    Four of its corruptions: Gaussian noise, Gaussian blur, contrast, JPEG compression.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvlab.ops import jpeg
from cvlab.ops.visualize import gaussian_blur

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_PX = 64  # up to this side the strengths are those of CIFAR-10-C
NOISE_STD = {True: (0.04, 0.06, 0.08, 0.09, 0.10), False: (0.08, 0.12, 0.18, 0.26, 0.38)}  # of pixels in [0, 1]
BLUR_SIGMA = {True: (0.4, 0.6, 0.7, 0.8, 1.0), False: (1.0, 2.0, 3.0, 4.0, 6.0)}  # in pixels
CONTRAST = {
    True: (0.75, 0.5, 0.4, 0.3, 0.15),
    False: (0.4, 0.3, 0.2, 0.1, 0.05),
}  # factor of the distance from the mean
JPEG_QUALITY = {True: (80, 65, 58, 50, 40), False: (25, 18, 15, 10, 7)}


def apply(name: str, images: Tensor, severity: int, normal: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Return corrupted copies of images.

    Args:
        name: A key of `CORRUPTIONS`.
        images: uint8 (N, H, W, C).
        severity: 1 to 5.
        normal: A shape to standard normal numbers; used by `noise`.

    Returns:
        uint8 (N, H, W, C).
    """
    is_small = max(images.shape[1:3]) <= SMALL_PX
    return CORRUPTIONS[name](images, is_small, severity - 1, normal)


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _noise(images: Tensor, is_small: bool, level: int, normal: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    std = 255 * NOISE_STD[is_small][level]
    return _to_uint8(images.float() + std * normal(tuple(images.shape)).to(images.device))


def _blur(images: Tensor, is_small: bool, level: int, _: Any) -> Tensor:
    pixels = gaussian_blur(images.permute(0, 3, 1, 2).float(), BLUR_SIGMA[is_small][level])
    return _to_uint8(pixels).permute(0, 2, 3, 1)


def _contrast(images: Tensor, is_small: bool, level: int, _: Any) -> Tensor:
    pixels = images.float()
    mean = pixels.mean((1, 2), keepdim=True)  # of each channel of each image
    return _to_uint8((pixels - mean) * CONTRAST[is_small][level] + mean)


def _jpeg(images: Tensor, is_small: bool, level: int, _: Any) -> Tensor:
    quality = JPEG_QUALITY[is_small][level]
    return torch.stack([_compress(image, quality) for image in images.cpu()]).to(images.device)


def _compress(image: Tensor, quality: int) -> Tensor:
    """Return an image (H, W, C), C = 1 or 3, as it is after JPEG compression."""
    array: Any = image.numpy()
    picture = Image.fromarray(array[:, :, 0] if image.shape[2] == 1 else array)
    return torch.from_numpy(np.array(jpeg.compress(picture, quality))).view(image.shape)


CORRUPTIONS: dict[str, Callable[[Tensor, bool, int, Callable[[tuple[int, ...]], Tensor]], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
