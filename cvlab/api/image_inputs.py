"""Images that a user gives in Python, in any of the usual types, as RGB photos."""

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvlab.data import photo_paths, photos
from cvlab.errors import ConfigError

HINT = "give paths, PIL images, arrays (H, W, 3) or tensors (3, H, W), with numbers in [0, 1] or integers of 8 bits"


def to_images(images: Any) -> list[Image.Image]:
    """Return one image, or a sequence of them, as RGB photos.

    Raises:
        DataError: A file cannot be read.
        ConfigError: It is something else than images.
    """
    if isinstance(images, (str, PathLike)):
        return [photos.load(path) for path in photo_paths.find_images([fspath(images)])]
    if isinstance(images, Image.Image):
        return [photos.to_rgb(images)]
    if isinstance(images, (Tensor, np.ndarray)):
        return _from_numbers(images)
    if isinstance(images, Sequence) and not isinstance(images, (bytes, dict)):
        return [photo for image in images for photo in to_images(image)]
    raise ConfigError(f"{type(images).__name__} is no image", HINT)


def _from_numbers(values: Any) -> list[Image.Image]:
    """Return a tensor ([N,] 3 or 1, H, W), or an array ([N,] H, W[, 3 or 1]), as RGB photos."""
    shape = tuple(values.shape)
    pixels = torch.from_numpy(values.copy()) if isinstance(values, np.ndarray) else values.detach().cpu()
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif isinstance(values, np.ndarray) and pixels.ndim in (3, 4):
        pixels = pixels.movedim(-1, -3)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape[1:]:
        raise ConfigError(f"an image of shape {shape}", HINT)
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    elif not pixels.is_floating_point():
        raise ConfigError(f"an image of {values.dtype}", HINT)
    pixels = pixels.float()
    if pixels.numel() and not (pixels.min() >= 0 and pixels.max() <= 1):  # also NaN
        raise ConfigError(f"an image with numbers from {pixels.min():g} to {pixels.max():g}", HINT)
    return [photos.to_image(each.expand(3, -1, -1)) for each in pixels]
