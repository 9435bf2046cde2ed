"""What becomes of a photo that is passed on: JPEG compression, a smaller size, a crop; of images and of their pixels.

An attack survives these changes if it is optimized through them, with another random size and place in each step.

References:
    Athalye et al., 2018, "Synthesizing robust adversarial examples", section 2 (expectation over transformation).

Differences from the paper:
    The changes are those of messengers and web sites, in place of perspective, rotation and light.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

from cvlab.ops.jpeg import compress, differentiable_jpeg
from cvlab.ops.resample import DifferentiableResize, resize_matrix

MIN_SCALE = 0.5  # of `Resize`, of each side
EVALUATED_SCALES = (0.5, 0.75)
CROP_FRACTION = 0.9  # of each side, that `Crop` leaves
EVALUATED_PLACES = ((0.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (1.0, 1.0))  # corners and center
NUM_UNIFORM = 3  # random numbers that a change needs: the place of a crop, the scale of a resize


class PhotoChange(Protocol):
    """A change of a photo."""

    def variants(self, image: Image.Image) -> list[Image.Image]:
        """Return changed copies of an RGB image, on which survival is measured."""

    def __call__(self, pixels: Tensor, uniform: Sequence[float]) -> Tensor:
        """Return a differentiable, changed copy (3, H', W') of an image (3, H, W) in [0, 1].

        `uniform` are `NUM_UNIFORM` random numbers in [0, 1).
        """


@dataclass(frozen=True)
class Jpeg:
    """JPEG compression."""

    quality: int

    def variants(self, image: Image.Image) -> list[Image.Image]:
        """Return the image, written and read again."""
        return [compress(image, self.quality)]

    def __call__(self, pixels: Tensor, uniform: Sequence[float]) -> Tensor:  # noqa: ARG002 - as PhotoChange has it
        """Compress; there is nothing random about it."""
        return differentiable_jpeg(pixels[None], self.quality)[0]


@dataclass(frozen=True)
class Resize:
    """A smaller size, from `MIN_SCALE` to the whole."""

    def variants(self, image: Image.Image) -> list[Image.Image]:
        """Return the image at `EVALUATED_SCALES`."""
        sizes = [_scaled(image.size, scale) for scale in EVALUATED_SCALES]
        return [image.resize(size, Image.Resampling.BICUBIC) for size in sizes]

    def __call__(self, pixels: Tensor, uniform: Sequence[float]) -> Tensor:
        """Resize to a random scale."""
        height, width = pixels.shape[1:]
        new_width, new_height = _scaled((width, height), MIN_SCALE + (1 - MIN_SCALE) * uniform[2])
        rows = resize_matrix(height, 0, height, new_height, "bicubic")[0]
        columns = resize_matrix(width, 0, width, new_width, "bicubic")[0]
        resize = DifferentiableResize((0, 0, width, height), rows, columns, pixels.device)
        return resize(pixels).clamp(0, 1)


@dataclass(frozen=True)
class Crop:
    """A crop of `CROP_FRACTION` of both sides."""

    def variants(self, image: Image.Image) -> list[Image.Image]:
        """Return the crops at `EVALUATED_PLACES`."""
        return [image.crop(_crop_box(image.size, place)) for place in EVALUATED_PLACES]

    def __call__(self, pixels: Tensor, uniform: Sequence[float]) -> Tensor:
        """Crop at a random place."""
        height, width = pixels.shape[1:]
        left, top, right, bottom = _crop_box((width, height), (uniform[0], uniform[1]))
        return pixels[:, top:bottom, left:right]


def build(name: str) -> PhotoChange:
    """Return the change of a name: `crop`, `resize`, or `jpeg` with a quality, such as `jpeg75`."""
    if name == "crop":
        return Crop()
    return Resize() if name == "resize" else Jpeg(int(name.removeprefix("jpeg")))


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def _crop_box(size: tuple[int, int], place: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of a crop at a place from (0, 0), top left, to (1, 1), bottom right."""
    width, height = _scaled(size, CROP_FRACTION)
    left, top = round((size[0] - width) * place[0]), round((size[1] - height) * place[1])
    return left, top, left + width, top + height
