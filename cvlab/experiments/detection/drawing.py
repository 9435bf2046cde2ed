"""Draw labeled boxes on photos, and contact sheets of photos."""

import colorsys
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from cvlab.reports import fonts, images

GOLDEN_RATIO = 0.618034  # a hue step that keeps the colors of consecutive classes distinct
TEXT_FRACTION = 0.026  # of the photo's longer side
BOX_TEXT_FRACTION = 0.2  # at most, of the median of the boxes' longer sides
MIN_TEXT_PX = 12
MAX_LABEL_ROWS = 16  # below each other, in which a label may move away from the corner of its box
LEGEND_PX, LEGEND_TEXT_PX = 34, 16
LEGEND_COLOR = (235, 235, 235)
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
    text_px = _text_px(photo, boxes)
    line = max(2, round(text_px / 6))
    for box in gt_boxes:
        _draw_ground_truth(pen, _inside(box, photo), line)
    for item in reversed(boxes):
        pen.rectangle(_inside(item.box_xyxy, photo), outline=color_of(item.color), width=line)
    placed: list[Box] = []
    for item in boxes:
        if item.text:
            size = (fonts.width(item.text, text_px) + 6, float(fonts.line_px(text_px)))
            placed.append(_place_label(_inside(item.box_xyxy, photo), size, photo.size, placed))
            _draw_label(pen, item, placed[-1], text_px)
    return sheet


def _text_px(photo: Image.Image, boxes: Sequence[LabeledBox]) -> int:
    """Return the size of labels: by the photo's, but less if its objects are small, so that labels do not hide them."""
    sizes = [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (item.box_xyxy for item in boxes)]
    of_boxes = BOX_TEXT_FRACTION * statistics.median(sizes) if sizes else float("inf")
    return max(MIN_TEXT_PX, round(min(TEXT_FRACTION * max(photo.size), of_boxes)))


def crop(photo: Image.Image, box_xyxy: Box) -> Image.Image:
    """Return the pixels that a box touches, at least one."""
    left, top = min(math.floor(box_xyxy[0]), photo.width - 1), min(math.floor(box_xyxy[1]), photo.height - 1)
    left, top = max(left, 0), max(top, 0)
    right, bottom = max(math.ceil(box_xyxy[2]), left + 1), max(math.ceil(box_xyxy[3]), top + 1)
    return photo.crop((left, top, min(right, photo.width), min(bottom, photo.height)))


def _draw_ground_truth(pen: ImageDraw.ImageDraw, box: Box, line: int) -> None:
    pen.rectangle(box, outline="black", width=line + 2)
    pen.rectangle(box, outline="white", width=max(1, line - 1))


def _inside(box: Box, photo: Image.Image) -> Box:
    """Clip a box so that its outline is visible."""
    left, top = min(max(box[0], 0), photo.width - 1), min(max(box[1], 0), photo.height - 1)
    return left, top, max(left, min(box[2], photo.width) - 1), max(top, min(box[3], photo.height) - 1)


def _place_label(box: Box, size: tuple[float, float], photo_size: tuple[int, int], placed: Sequence[Box]) -> Box:
    """Return where a label goes: at a corner of its box, or below or above one, where it covers no other label.

    Where all of these positions are taken it is the one at which the label covers least of the others.
    """
    width, height = size
    left, top, right, bottom = box
    rows = [top - height, top, bottom]
    rows += [top + offset * height for k in range(1, MAX_LABEL_ROWS) for offset in (k, -1 - k)]
    candidates: list[Box] = []
    for y in rows:
        for x in (left, right - width):
            x = max(0.0, min(x, photo_size[0] - width))
            if 0 <= y <= photo_size[1] - height:
                candidates.append((x, y, x + width, y + height))
    if not candidates:  # the photo is lower than the label
        return (max(0.0, min(left, photo_size[0] - width)), 0.0, left + width, height)
    return min(candidates, key=lambda candidate: sum(_overlap(candidate, other) for other in placed))


def _overlap(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _draw_label(pen: ImageDraw.ImageDraw, item: LabeledBox, place: Box, text_px: int) -> None:
    """Write the text of a box on its color."""
    fill = color_of(item.color)
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=fill)
    luminance = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    fonts.draw(pen, (place[0] + 3, place[1]), item.text, text_px, "black" if luminance > 130 else "white")


def legend(width: int) -> Image.Image:
    """Draw what the boxes of `draw` mean."""
    line = 3
    sheet = Image.new("RGB", (width, LEGEND_PX), LEGEND_COLOR)
    pen = ImageDraw.Draw(sheet)
    x, half = 10.0, LEGEND_TEXT_PX // 2
    entries = (("ground truth", None), ("detection: class and score, one color for each class", color_of(0)))
    for text, color in entries:
        box = (x, LEGEND_PX / 2 - half, x + 2 * LEGEND_TEXT_PX, LEGEND_PX / 2 + half)
        if color is None:
            _draw_ground_truth(pen, box, line)
        else:
            pen.rectangle(box, outline=color, width=line)
        x = box[2] + 8
        fonts.draw(pen, (x, (LEGEND_PX - fonts.line_px(LEGEND_TEXT_PX)) / 2), text, LEGEND_TEXT_PX)
        x += fonts.width(text, LEGEND_TEXT_PX) + 24
    return sheet


def contact_sheet(
    photos: Sequence[Image.Image], title: str, has_ground_truth: bool = False, columns: int = 4, tile_px: int = 480
) -> Image.Image:
    """Arrange photos of any sizes in rows of square tiles, below a title.

    Args:
        photos: The photos with their boxes.
        title: Text above the photos.
        has_ground_truth: Whether the boxes of the ground truth are drawn, which a legend explains.
        columns: Maximum number of photos in a row.
        tile_px: Side of a tile.
    """
    columns = max(1, min(columns, len(photos)))
    rows = -(-len(photos) // columns)
    head = LEGEND_PX if has_ground_truth else 0
    sheet = Image.new("RGB", (columns * tile_px, head + rows * tile_px), "white")
    if has_ground_truth:
        sheet.paste(legend(sheet.width), (0, 0))
    for k, photo in enumerate(photos):
        factor = (tile_px - 4) / max(photo.size)
        size = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
        tile = photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        left = k % columns * tile_px + (tile_px - size[0]) // 2
        sheet.paste(tile, (left, head + k // columns * tile_px + (tile_px - size[1]) // 2))
    return images.titled(sheet, title)
