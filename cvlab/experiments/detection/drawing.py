"""Draw labeled boxes on photos, and contact sheets of photos."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GOLDEN_RATIO = 0.618034  # a hue step that keeps the colors of consecutive classes distinct
TEXT_FRACTION = 0.026  # of the photo's longer side
MIN_TEXT_PX = 11
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class LabeledBox:
    """A box in pixels, the text at its corner, and the number (of a class, say) that gives its color."""

    box_xyxy: Box
    text: str
    color: int


def color_of(number: int) -> tuple[int, int, int]:
    """Return a bright RGB color for a class."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + number * GOLDEN_RATIO) % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(photo: Image.Image, boxes: Sequence[LabeledBox], gt_boxes: Sequence[Box] = ()) -> Image.Image:
    """Draw boxes on a photo, the first on top; `gt_boxes` are drawn in thin white below them."""
    sheet = photo.copy()
    pen = ImageDraw.Draw(sheet)
    text_px = max(MIN_TEXT_PX, round(TEXT_FRACTION * max(photo.size)))
    font = ImageFont.load_default(text_px)
    line = max(2, round(text_px / 6))
    for box in gt_boxes:
        pen.rectangle(_inside(box, photo), outline="black", width=line + 2)
        pen.rectangle(_inside(box, photo), outline="white", width=max(1, line - 1))
    for item in reversed(boxes):
        pen.rectangle(_inside(item.box_xyxy, photo), outline=color_of(item.color), width=line)
    for item in reversed(boxes):
        _draw_label(pen, item, font, text_px, photo)
    return sheet


def _inside(box: Box, photo: Image.Image) -> Box:
    """Clip a box so that its outline is visible."""
    left, top = min(max(box[0], 0), photo.width - 1), min(max(box[1], 0), photo.height - 1)
    return left, top, max(left, min(box[2], photo.width) - 1), max(top, min(box[3], photo.height) - 1)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    item: LabeledBox,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text_px: int,
    photo: Image.Image,
) -> None:
    """Write the text at the upper left corner of a box: above it if there is room, else inside."""
    if not item.text:
        return
    left, top = _inside(item.box_xyxy, photo)[:2]
    width, height = pen.textlength(item.text, font=font) + 6, text_px + 5
    left = max(0.0, min(left, photo.width - width))
    top = top - height if top >= height else top
    fill = color_of(item.color)
    pen.rectangle((left, top, left + width, top + height), fill=fill)
    luminance = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    pen.text((left + 3, top + 1), item.text, fill="black" if luminance > 130 else "white", font=font)


def contact_sheet(photos: Sequence[Image.Image], columns: int = 4, tile_px: int = 320) -> Image.Image:
    """Arrange photos of any sizes in rows of square tiles."""
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
