"""Photos with boxes drawn on them, and sheets of such photos."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GOLDEN = 0.618034  # steps of the hue by it keep the colours of neighbouring classes apart
TEXT_SHARE = 0.026  # of the photo's longer side
LEAST_TEXT_PX = 11
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Labelled:
    """A box (left, top, right, bottom) in pixels, what is written at it, and the number that gives its colour."""

    box_xyxy: Box
    text: str
    colour: int


def colour(number: int) -> tuple[int, int, int]:
    """Return a bright colour for a class."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + number * GOLDEN) % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(photo: Image.Image, found: Sequence[Labelled], wanted: Sequence[Box] = ()) -> Image.Image:
    """Draw what was found, the surest last so that it lies on top; `wanted` are boxes in thin white below it."""
    sheet = photo.copy()
    pen = ImageDraw.Draw(sheet)
    text_px = max(LEAST_TEXT_PX, round(TEXT_SHARE * max(photo.size)))
    font = ImageFont.load_default(text_px)
    line = max(2, round(text_px / 6))
    for box in wanted:
        pen.rectangle(_inside(box, photo), outline="black", width=line + 2)
        pen.rectangle(_inside(box, photo), outline="white", width=max(1, line - 1))
    for item in reversed(found):
        pen.rectangle(_inside(item.box_xyxy, photo), outline=colour(item.colour), width=line)
    for item in reversed(found):
        _write(pen, item, font, text_px, photo)
    return sheet


def _inside(box: Box, photo: Image.Image) -> Box:
    left, top = min(max(box[0], 0), photo.width - 1), min(max(box[1], 0), photo.height - 1)
    return left, top, max(left, min(box[2], photo.width) - 1), max(top, min(box[3], photo.height) - 1)


def _write(
    pen: ImageDraw.ImageDraw,
    item: Labelled,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text_px: int,
    photo: Image.Image,
) -> None:
    """Write at the upper left corner of a box: above it where there is room, else inside."""
    if not item.text:
        return
    left, top = _inside(item.box_xyxy, photo)[:2]
    width, height = pen.textlength(item.text, font=font) + 6, text_px + 5
    left = max(0.0, min(left, photo.width - width))
    top = top - height if top >= height else top
    fill = colour(item.colour)
    pen.rectangle((left, top, left + width, top + height), fill=fill)
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    pen.text((left + 3, top + 1), item.text, fill="black" if bright > 130 else "white", font=font)


def contact_sheet(photos: Sequence[Image.Image], columns: int = 4, tile_px: int = 320) -> Image.Image:
    """Put photos of any sizes in rows of tiles."""
    columns = max(1, min(columns, len(photos)))
    rows = -(-len(photos) // columns)
    sheet = Image.new("RGB", (columns * tile_px, rows * tile_px), "white")
    for k, photo in enumerate(photos):
        factor = (tile_px - 4) / max(photo.size)
        size = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
        tile = photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        left = k % columns * tile_px + (tile_px - size[0]) // 2
        sheet.paste(tile, (left, k // columns * tile_px + (tile_px - size[1]) // 2))
    return sheet
