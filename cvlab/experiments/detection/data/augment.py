"""Square views of photos with boxes: whole, or zoomed, stretched, mirrored and recoloured at random; and back again.

A random view is a pure function of (seed, photo, number), so that nothing of it needs saving.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from cvlab.data import rng
from cvlab.ops import style

GREY = (114, 114, 114)  # around a photo that does not fill the square
VISIBLE = 0.3  # of a box's area: with less of it in the view it is left out
LEAST_PX = 2.0  # sides of a box in a view


@dataclass(frozen=True)
class Drawn:
    """How a photo is drawn into a square: x' = scale_x * x + left, y' = scale_y * y + top, then mirrored or not."""

    size_px: int
    scale_x: float
    scale_y: float
    left: float
    top: float
    mirrored: bool = False

    def view(self, photo: Image.Image) -> Image.Image:
        """Draw it: an RGB square, grey where the photo does not reach."""
        size = self.size_px
        first_x, last_x = _clamped(self.left, size), _clamped(self.left + self.scale_x * photo.width, size)
        first_y, last_y = _clamped(self.top, size), _clamped(self.top + self.scale_y * photo.height, size)
        width, height = max(1, last_x - first_x), max(1, last_y - first_y)
        first_x, first_y = min(first_x, size - 1), min(first_y, size - 1)
        box = (
            max(0.0, (first_x - self.left) / self.scale_x),
            max(0.0, (first_y - self.top) / self.scale_y),
            min(float(photo.width), (first_x + width - self.left) / self.scale_x),
            min(float(photo.height), (first_y + height - self.top) / self.scale_y),
        )
        part = photo.resize((width, height), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        if (width, height) == (size, size):
            sheet = part
        else:
            sheet = Image.new("RGB", (size, size), GREY)
            sheet.paste(part, (first_x, first_y))
        return ImageOps.mirror(sheet) if self.mirrored else sheet

    def boxes(self, boxes_xyxy: Tensor) -> Tensor:
        """Return where boxes (N, 4) of the photo lie in the view; not clipped."""
        scale = boxes_xyxy.new_tensor([self.scale_x, self.scale_y] * 2)
        shift = boxes_xyxy.new_tensor([self.left, self.top] * 2)
        return self._flipped(boxes_xyxy * scale + shift)

    def back(self, boxes_xyxy: Tensor) -> Tensor:
        """Return where boxes (N, 4) of the view lie in the photo; not clipped."""
        scale = boxes_xyxy.new_tensor([self.scale_x, self.scale_y] * 2)
        shift = boxes_xyxy.new_tensor([self.left, self.top] * 2)
        return (self._flipped(boxes_xyxy) - shift) / scale

    def _flipped(self, boxes_xyxy: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes_xyxy
        x1, y1, x2, y2 = boxes_xyxy.unbind(1)
        return torch.stack([self.size_px - x2, y1, self.size_px - x1, y2], 1)

    def visible(self, boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the boxes (K, 4) that can be seen in the view, clipped, and which of the photo's they are, (K,)."""
        placed = self.boxes(boxes_xyxy)
        clipped = placed.clamp(0, self.size_px)
        sides = clipped[:, 2:] - clipped[:, :2]
        whole = (placed[:, 2:] - placed[:, :2]).prod(1)
        seen = (sides.prod(1) >= VISIBLE * whole) & (sides.amin(1) >= LEAST_PX)
        return clipped[seen], seen.nonzero()[:, 0]


def _clamped(value: float, most: int) -> int:
    return min(max(round(value), 0), most)


def whole(width: int, height: int, size_px: int) -> Drawn:
    """Return the view of a whole photo: its longer side fills the square, in the middle, aspect ratio kept."""
    scale = size_px / max(width, height)
    return Drawn(size_px, scale, scale, (size_px - scale * width) / 2, (size_px - scale * height) / 2)


@dataclass(frozen=True)
class Changes:
    """How much random views differ: factors of size and of aspect ratio, shares of the colours' ranges."""

    zoom: float = 1.6
    aspect: float = 1.25
    flip: bool = True
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.4


def drawn(width: int, height: int, size_px: int, changes: Changes, seed: int, photo: int, number: int) -> Drawn:
    """Draw a random view of a photo of `width` x `height` pixels."""
    u = rng.uniform(seed, number, photo * 16 + torch.arange(5), "views").tolist()
    zoom = math.exp((2 * u[0] - 1) * math.log(changes.zoom))
    aspect = math.exp((2 * u[1] - 1) * math.log(changes.aspect))
    scale = zoom * size_px / max(width, height)
    scale_x, scale_y = scale * math.sqrt(aspect), scale / math.sqrt(aspect)
    # Where the photo is larger than the view, anywhere in it; where it is smaller, anywhere in the view.
    left, top = (size_px - scale_x * width) * u[2], (size_px - scale_y * height) * u[3]
    return Drawn(size_px, scale_x, scale_y, left, top, changes.flip and u[4] < 0.5)


def recoloured(view: Tensor, changes: Changes, seed: int, photo: int, number: int) -> Tensor:
    """Change brightness, contrast and saturation of a view (3, S, S) in [0, 1] at random."""
    u = (rng.uniform(seed, number, photo * 16 + 8 + torch.arange(3), "views") * 2 - 1).tolist()
    grey = style.luminance(view)
    view = torch.lerp(grey.expand_as(view), view, 1 + changes.saturation * u[0])
    view = (view - grey.mean()) * (1 + changes.contrast * u[1]) + grey.mean() * (1 + changes.brightness * u[2])
    return view.clamp(0, 1)
