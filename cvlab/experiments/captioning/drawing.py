"""Attention maps of a caption: the photo, and the photo again for each word with its attention weights overlaid."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cvlab.reports import images

TILE_PX = 224  # longer side of each tile
COLUMNS = 6


def attention_sheet(photo: Image.Image, tokens: Sequence[str], weights: Tensor) -> Image.Image:
    """Draw a photo and, for each token, the photo with its attention map.

    Args:
        photo: The photo.
        tokens: The T tokens of the caption.
        weights: Attention weights (T, h, w) over the whole photo; each map is scaled by its own maximum.

    Returns:
        The tiles in rows of `COLUMNS`.
    """
    factor = TILE_PX / max(photo.size)
    tile = photo.resize((max(1, round(photo.width * factor)), max(1, round(photo.height * factor))))
    tiles = [_labeled(tile, "")]
    for token, attention_map in zip(tokens, weights, strict=True):
        overlay = images.overlay(tile, images.scaled(attention_map, 1.0), (0, 0, *tile.size))
        tiles.append(_labeled(overlay, token))
    return images.strip(tiles, COLUMNS)


def _labeled(tile: Image.Image, token: str) -> Image.Image:
    font = ImageFont.load_default(images.TEXT_PX)
    header_px = images.TEXT_PX + images.MARGIN
    frame = Image.new("RGB", (tile.width + images.MARGIN, tile.height + header_px), "white")
    ImageDraw.Draw(frame).text((0, 2), token, fill="black", font=font)
    frame.paste(tile, (0, header_px))
    return frame
