"""Where a captioner looks: the photo once for each word of its sentence."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cvlab.reports import images

TILE_PX = 224  # the longer side of the photo for a word
COLUMNS = 6


def strip(photo: Image.Image, words: Sequence[str], weights: Tensor) -> Image.Image:
    """Draw a photo, and again for each word with the map of where it was looked; `weights` (words, h, w).

    Each map is as bright at its brightest cell. The maps belong to the whole photo.
    """
    factor = TILE_PX / max(photo.size)
    small = photo.resize((max(1, round(photo.width * factor)), max(1, round(photo.height * factor))))
    frames = [_frame(small, "")]
    for word, looked in zip(words, weights, strict=True):
        seen = images.overlay(small, images.scaled(looked, 1.0), (0, 0, *small.size))
        frames.append(_frame(seen, word))
    return images.strip(frames, COLUMNS)


def _frame(image: Image.Image, word: str) -> Image.Image:
    font = ImageFont.load_default(images.TEXT_PX)
    head = images.TEXT_PX + images.MARGIN
    frame = Image.new("RGB", (image.width + images.MARGIN, image.height + head), "white")
    ImageDraw.Draw(frame).text((0, 2), word, fill="black", font=font)
    frame.paste(image, (0, head))
    return frame
