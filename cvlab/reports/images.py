"""Images of a run: PNG files, heat maps, overlays, panels with captions, animations."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from cvlab.reports import fonts

MARGIN = 8
TEXT_PX, TITLE_PX = 15, 18
MAX_TILE_PX = 480
MIN_COLUMN_PX, MAX_COLUMNS = 150, 4  # of a panel
COLOR_BAR_PX = 56
MAX_SHEET_FRAMES = 12
LIGHTEST_SHADOW = 70  # gray level of black in a photo below an overlay
SMOOTHING = 0.012  # standard deviation of an overlay's smoothing, of its shorter side
OVERLAY_QUANTILE = 0.995
MAX_OPACITY = 0.85
BICUBIC = Image.Resampling.BICUBIC
SIGNED = ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31))  # colors of -1, -1/2, .. 1
NEIGHBOR_PX = 64
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
HEAT = (  # the colors of matplotlib's inferno at 0, 1/8, .. 1
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)


def png(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """Encode an image as PNG, with metadata as `photos.read_metadata` returns it, or with `dpi`.

    Level 1 takes a fifth of the time of the default 6 for a tenth more bytes.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1, **(metadata or {}))
    return buffer.getvalue()


def scaled(values: Tensor, quantile: float = 0.999) -> Tensor:
    """Scale a map (H, W) to [0, 1] by its `quantile`, so that single pixels do not darken all others."""
    values = values.detach().float().cpu().clamp(min=0)
    top = torch.from_numpy(np.quantile(values.numpy(), [quantile])).float()
    top = top if float(top) > 0 else values.max()
    return (values / top.clamp(min=1e-30)).clamp(0, 1)


def heat(values: Tensor) -> Image.Image:
    """Color a map (H, W) in [0, 1] from dark to bright."""
    return _color(values, HEAT)


def signed(values: Tensor) -> Image.Image:
    """Color a map (H, W) in [-1, 1]: negative values blue, positive ones red, 0 white."""
    return _color((values + 1) / 2, SIGNED)


def _color(values: Tensor, colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Color a map (H, W) in [0, 1] by colors at equal distances."""
    positions = np.linspace(0, 1, len(colors))
    flat = values.cpu().numpy()
    channels = [np.interp(flat, positions, [color[c] for color in colors]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def overlay(photo: Image.Image, values: Tensor, box: Box, stretch: bool = True) -> Image.Image:
    """Overlay a map (h, w) in [0, 1] on the part of a photo that it belongs to, around which a line is drawn.

    The photo is shown in light gray, the map smoothed: single bright pixels would be lost in the photo's texture.

    Args:
        photo: The photo.
        values: The map.
        box: Where the map belongs, in pixels of the photo.
        stretch: Scale the smoothed map to [0, 1]; False for maps that are compared with each other.
    """
    left, top, right, bottom = (round(edge) for edge in box)
    size = (max(1, right - left), max(1, bottom - top))
    gray = photo.convert("L").point([LIGHTEST_SHADOW + level * (255 - LIGHTEST_SHADOW) // 255 for level in range(256)])
    canvas = gray.convert("RGB")
    strength = _to_gray(values).resize(size, BICUBIC)
    strength = strength.filter(ImageFilter.GaussianBlur(SMOOTHING * min(size)))
    smooth = torch.from_numpy(np.asarray(strength) / 255.0)
    smooth = scaled(smooth, OVERLAY_QUANTILE) if stretch else smooth
    mask = _to_gray(smooth).point([round(MAX_OPACITY * level) for level in range(256)])
    canvas.paste(heat(smooth), (left, top), mask)
    return outline(canvas, box)


def _to_gray(values: Tensor) -> Image.Image:
    return Image.fromarray((values.cpu().numpy() * 255).round().astype(np.uint8))


def outline(image: Image.Image, box: Box) -> Image.Image:
    """Draw a line, white on black, along the inner edge of a region; nothing if it is the whole image."""
    left, top, right, bottom = (round(edge) for edge in box)
    if (left, top, right, bottom) == (0, 0, *image.size):
        return image
    outlined = image.copy()
    pen = ImageDraw.Draw(outlined)
    line = max(1, round(max(image.size) / 300))
    pen.rectangle((left, top, right - 1, bottom - 1), outline="black", width=2 * line)
    pen.rectangle((left, top, right - 1, bottom - 1), outline="white", width=line)
    return outlined


def difference(before: Image.Image, after: Image.Image, times: int) -> Image.Image:
    """Return the difference of two images around mid-gray, amplified `times`."""
    change = np.asarray(after, dtype=np.int16) - np.asarray(before, dtype=np.int16)
    return Image.fromarray(np.clip(128 + times * change, 0, 255).astype(np.uint8))


def saliency_tiles(caption: str, photo: Image.Image, values: Tensor, box: Box) -> list[tuple[str, Image.Image]]:
    """Return the captioned tiles of a saliency map (h, w) in [0, 1]: the map, and its overlay on the part it is of."""
    left, top, right, bottom = box
    inside = (max(0, left), max(0, top), min(photo.width, right), min(photo.height, bottom))
    part = photo.resize((values.shape[1], values.shape[0]), BICUBIC, box=inside)
    return [(caption, heat(values)), ("overlay, smoothed", overlay(part, values, (0, 0, *part.size)))]


def panel(
    tiles: Sequence[tuple[str, Image.Image]],
    title: str = "",
    has_color_bar: bool = False,
    max_tile_px: int = MAX_TILE_PX,
) -> Image.Image:
    """Arrange images of the same height side by side, in rows of up to MAX_COLUMNS, each below its caption.

    Args:
        tiles: The captions and images; the images are resized.
        title: Text above them.
        has_color_bar: Draw the colors of `heat` from 0 to 1 to the right of the last tile.
        max_tile_px: Maximum of a tile's width and height; panels are previews of images that are saved in full size.
    """
    height = _tile_height([image for _, image in tiles], max_tile_px)
    num_rows = -(-len(tiles) // MAX_COLUMNS)
    columns = -(-len(tiles) // num_rows)
    rows = [_panel_row(tiles[k : k + columns], height) for k in range(0, len(tiles), columns)]
    if has_color_bar:
        rows[-1] = _with_color_bar(rows[-1], height)
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return titled(sheet, title) if title else sheet


def _panel_row(tiles: Sequence[tuple[str, Image.Image]], height: int) -> Image.Image:
    shown = [image.resize((max(1, round(image.width * height / image.height)), height), BICUBIC) for _, image in tiles]
    widths = [max(image.width, MIN_COLUMN_PX) for image in shown]
    wrapped = [fonts.wrap(caption, TEXT_PX, width) for (caption, _), width in zip(tiles, widths, strict=True)]
    head = fonts.line_px(TEXT_PX) * max(map(len, wrapped)) + MARGIN // 2
    row = Image.new("RGB", (sum(widths) + MARGIN * (len(shown) + 1), head + height + MARGIN), "white")
    pen = ImageDraw.Draw(row)
    x = MARGIN
    for image, lines, width in zip(shown, wrapped, widths, strict=True):
        fonts.draw_lines(pen, (x, 0), lines, TEXT_PX)
        row.paste(image, (x, head))
        x += width + MARGIN
    return row


def _with_color_bar(row: Image.Image, height: int) -> Image.Image:
    sheet = Image.new("RGB", (row.width + COLOR_BAR_PX, row.height), "white")
    sheet.paste(row, (0, 0))
    sheet.paste(_color_bar(height), (row.width, row.height - height - MARGIN))
    return sheet


def _tile_height(tiles: Sequence[Image.Image], max_px: int) -> int:
    """Return the height at which no tile is wider than `max_px` or higher; small images are enlarged to 2/3 of it."""
    limit = min(max_px * min(1.0, image.height / image.width) for image in tiles)
    return max(1, round(min(limit, max(2 * max_px / 3, *(image.height for image in tiles)))))


def _color_bar(height: int) -> Image.Image:
    """Draw the colors of `heat` from 0 at the bottom to 1 at the top, with their values."""
    bar = Image.new("RGB", (COLOR_BAR_PX, height), "white")
    colors = heat(torch.linspace(1, 0, height)[:, None].expand(height, COLOR_BAR_PX // 4))
    bar.paste(colors, (0, 0))
    pen = ImageDraw.Draw(bar)
    for value in (0.0, 0.5, 1.0):
        top = (1 - value) * (height - fonts.line_px(TEXT_PX))
        fonts.draw(pen, (colors.width + MARGIN // 2, top), f"{value:g}", TEXT_PX)
    return bar


def neighbor_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], title: str) -> Image.Image:
    """Arrange captioned images in rows, each an image and, behind a gap, its nearest neighbors.

    Args:
        rows: Caption and image of each tile; all rows have the same number.
        title: Text above them.
    """
    column_px, row_px, text_px = NEIGHBOR_PX + 60, NEIGHBOR_PX + 24, 13
    sheet = Image.new("RGB", (column_px * (1 + len(rows[0])), row_px * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, tiles in enumerate(rows):
        for column, (caption, picture) in enumerate(tiles):
            left = column_px * (column + (column > 0)) + 8  # the first caption takes two columns
            text = fonts.printable(caption)
            while fonts.width(text, text_px) > column_px * (1 + (column == 0)) - 6:
                text = text[:-1]
            fonts.draw(pen, (left, row * row_px + 2), text, text_px)
            scaled = picture.resize((NEIGHBOR_PX, NEIGHBOR_PX), Image.Resampling.NEAREST)
            sheet.paste(scaled, (left, row * row_px + 20))
    return titled(sheet, title)


def strip(frames: Sequence[Image.Image], columns: int = 6) -> Image.Image:
    """Arrange frames of the same size in rows, as evenly filled as they can be."""
    width, height = frames[0].size
    rows = -(-len(frames) // columns)
    columns = -(-len(frames) // rows)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for k, frame in enumerate(frames):
        sheet.paste(frame, (k % columns * width, k // columns * height))
    return sheet


def captioned(image: Image.Image, caption: str, width: int = 0) -> Image.Image:
    """Write a caption above an image, which is centered in a tile of at least `width` pixels."""
    tile_width = max(width, image.width)
    lines = fonts.wrap(caption, TEXT_PX, tile_width)
    head = len(lines) * fonts.line_px(TEXT_PX) + MARGIN // 2
    tile = Image.new("RGB", (tile_width + MARGIN, image.height + head + MARGIN), "white")
    pen = ImageDraw.Draw(tile)
    for k, line in enumerate(lines):
        left = (tile.width - fonts.width(line, TEXT_PX)) // 2
        fonts.draw(pen, (left, k * fonts.line_px(TEXT_PX)), line, TEXT_PX)
    tile.paste(image, ((tile.width - image.width) // 2, head))
    return tile


def titled(image: Image.Image, *paragraphs: str) -> Image.Image:
    """Write paragraphs above an image, each on lines of its own."""
    lines = [line for text in paragraphs for line in fonts.wrap(text, TITLE_PX, image.width - 2 * MARGIN)]
    head = MARGIN + len(lines) * fonts.line_px(TITLE_PX)
    sheet = Image.new("RGB", (image.width, image.height + head), "white")
    fonts.draw_lines(ImageDraw.Draw(sheet), (MARGIN, MARGIN // 2), lines, TITLE_PX)
    sheet.paste(image, (0, head))
    return sheet


def frames_sheet(title: str, frames: Sequence[tuple[int, Image.Image]]) -> Image.Image:
    """Arrange the last of a row of frames in large, then up to MAX_SHEET_FRAMES of the others in two rows.

    Args:
        title: Text above them.
        frames: The step and image (all of one size) of each frame, by step.
    """
    *others, (last_step, last) = frames
    if len(others) > MAX_SHEET_FRAMES:
        others = [others[k * len(others) // MAX_SHEET_FRAMES] for k in range(MAX_SHEET_FRAMES)]
    if not others:
        return titled(captioned(last, f"step {last_step} (final)"), title)
    grid = strip([captioned(image, f"step {step}") for step, image in others], -(-len(others) // 2))
    factor = (grid.height - fonts.line_px(TEXT_PX) - MARGIN - MARGIN // 2) / last.height
    large = last.resize((round(last.width * factor), round(last.height * factor)), BICUBIC)
    final = captioned(large, f"step {last_step} (final)")
    sheet = Image.new("RGB", (final.width + grid.width, max(final.height, grid.height)), "white")
    sheet.paste(final, (0, 0))
    sheet.paste(grid, (final.width, 0))
    return titled(sheet, title)


def gif(frames: Sequence[Image.Image], milliseconds: int = 120, last_milliseconds: int = 1500) -> bytes:
    """Encode frames as a GIF animation that pauses on the last one."""
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [last_milliseconds]
    first, *rest = frames
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return buffer.getvalue()
