"""Square views of photos with boxes: the whole photo, or a random crop, stretch, flip and color jitter of it.

A random view is a pure function of (seed, photo, number), so nothing about it has to be saved.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps, ImageStat
from torch import Tensor

from cvlab.data import rng
from cvlab.experiments.detection.config import AugmentConfig
from cvlab.ops import style

GRAY = (114, 114, 114)  # around a photo that does not fill the square
MIN_VISIBLE_FRACTION = 0.3  # of a box's area: boxes of which less is inside the view are dropped
MIN_SIDE_PX = 2.0  # of a box in a view


@dataclass(frozen=True)
class ViewTransform:
    """An affine map from a photo to a square view: x' = scale_x * x + left, y' = scale_y * y + top, then a flip."""

    size_px: int
    scale_x: float
    scale_y: float
    left: float
    top: float
    is_flipped: bool = False

    def render(self, photo: Image.Image) -> Image.Image:
        """Return the view: an RGB square, gray where the photo does not reach."""
        size = self.size_px
        first_x, last_x = _clamp(self.left, size), _clamp(self.left + self.scale_x * photo.width, size)
        first_y, last_y = _clamp(self.top, size), _clamp(self.top + self.scale_y * photo.height, size)
        width, height = max(1, last_x - first_x), max(1, last_y - first_y)
        first_x, first_y = min(first_x, size - 1), min(first_y, size - 1)
        source_box = (
            max(0.0, (first_x - self.left) / self.scale_x),
            max(0.0, (first_y - self.top) / self.scale_y),
            min(float(photo.width), (first_x + width - self.left) / self.scale_x),
            min(float(photo.height), (first_y + height - self.top) / self.scale_y),
        )
        resized = photo.resize((width, height), Image.Resampling.BILINEAR, box=source_box, reducing_gap=2.0)
        if (width, height) == (size, size):
            view = resized
        else:
            view = Image.new("RGB", (size, size), GRAY)
            view.paste(resized, (first_x, first_y))
        return ImageOps.mirror(view) if self.is_flipped else view

    def transform_boxes(self, boxes_xyxy: Tensor) -> Tensor:
        """Map boxes (N, 4) of the photo to the view, without clipping."""
        scale = boxes_xyxy.new_tensor([self.scale_x, self.scale_y] * 2)
        shift = boxes_xyxy.new_tensor([self.left, self.top] * 2)
        return self._flip(boxes_xyxy * scale + shift)

    def inverse_transform_boxes(self, boxes_xyxy: Tensor) -> Tensor:
        """Map boxes (N, 4) of the view back to the photo, without clipping."""
        scale = boxes_xyxy.new_tensor([self.scale_x, self.scale_y] * 2)
        shift = boxes_xyxy.new_tensor([self.left, self.top] * 2)
        return (self._flip(boxes_xyxy) - shift) / scale

    def _flip(self, boxes_xyxy: Tensor) -> Tensor:
        """Mirror boxes of the view if it is flipped."""
        if not self.is_flipped:
            return boxes_xyxy
        x1, y1, x2, y2 = boxes_xyxy.unbind(1)
        return torch.stack([self.size_px - x2, y1, self.size_px - x1, y2], 1)

    def visible_boxes(self, boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the boxes (K, 4) of those (N, 4) of the photo that are visible, clipped, and their indices (K,)."""
        transformed = self.transform_boxes(boxes_xyxy)
        clipped = transformed.clamp(0, self.size_px)
        sides = clipped[:, 2:] - clipped[:, :2]
        full_area = (transformed[:, 2:] - transformed[:, :2]).prod(1)
        is_visible = (sides.prod(1) >= MIN_VISIBLE_FRACTION * full_area) & (sides.amin(1) >= MIN_SIDE_PX)
        return clipped[is_visible], is_visible.nonzero()[:, 0]


def _clamp(value: float, maximum: int) -> int:
    return min(max(round(value), 0), maximum)


def whole_photo(width: int, height: int, size_px: int) -> ViewTransform:
    """Return the view of a whole photo: its longer side fills the square, centered, aspect ratio kept."""
    scale = size_px / max(width, height)
    return ViewTransform(size_px, scale, scale, (size_px - scale * width) / 2, (size_px - scale * height) / 2)


def preprocessing(size_px: int) -> dict[str, str | int]:
    """Describe `whole_photo` for those who run an exported detector: how a photo is brought in, how boxes go back."""
    return {
        "size_px": size_px,
        "scale": "size_px / max(width, height), with which width and height are multiplied; bilinear",
        "left": "(size_px - scale * width) / 2: the photo is centered; rounded for pasting",
        "top": "(size_px - scale * height) / 2",
        "fill": GRAY[0],
        "boxes": "x of the photo = (x - left) / scale, y of the photo = (y - top) / scale",
    }


def random_view(
    width: int, height: int, size_px: int, config: AugmentConfig, seed: int, photo: int, number: int
) -> ViewTransform:
    """Draw random view `number` of photo number `photo`, of `width` x `height` pixels."""
    u = rng.uniform(seed, number, photo * 16 + torch.arange(5), "views").tolist()
    zoom = math.exp((2 * u[0] - 1) * math.log(config.zoom))
    aspect = math.exp((2 * u[1] - 1) * math.log(config.aspect))
    scale = zoom * size_px / max(width, height)
    scale_x, scale_y = scale * math.sqrt(aspect), scale / math.sqrt(aspect)
    # A photo larger than the view is cropped at random; a smaller one is placed at random.
    left, top = (size_px - scale_x * width) * u[2], (size_px - scale_y * height) * u[3]
    return ViewTransform(size_px, scale_x, scale_y, left, top, config.flip and u[4] < 0.5)


def color_jitter(view: Image.Image, config: AugmentConfig, seed: int, photo: int, number: int) -> Image.Image:
    """Change saturation, contrast and brightness of an RGB view at random.

    All three at once, by one matrix on 8-bit pixels: each color moves away from or towards its luminance (saturation),
    the colors away from or towards the view's mean luminance (contrast), and that mean is scaled (brightness).
    """
    u = (rng.uniform(seed, number, photo * 16 + 8 + torch.arange(3), "views") * 2 - 1).tolist()
    strengths = (config.saturation, config.contrast, config.brightness)
    saturation, contrast, brightness = (1 + strength * value for strength, value in zip(strengths, u, strict=True))
    mean = sum(weight * value for weight, value in zip(style.LUMINANCE, ImageStat.Stat(view).mean, strict=True))
    to_gray = [contrast * (1 - saturation) * weight for weight in style.LUMINANCE]
    matrix: list[float] = []
    for channel in range(3):
        row = list(to_gray)
        row[channel] += contrast * saturation
        matrix += [*row, (brightness - contrast) * mean]
    return view.convert("RGB", tuple(matrix))
