"""Attention maps of a caption: the photo, and the photo again for each word with its attention weights overlaid."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from cvlab.reports import fonts, images

TILE_PX = 224  # longer side of each tile
MIN_COLUMN_PX = 120
COLUMNS = 6


def attention_sheet(photo: Image.Image, tokens: Sequence[str], weights: Tensor, name: str) -> Image.Image:
    """Draw a photo and, for each token, the photo with its attention map.

    Args:
        photo: The photo.
        tokens: The T tokens of the caption.
        weights: Attention weights (T, h, w) over the whole photo; each map is scaled by its own maximum.
        name: The photo's file name.

    Returns:
        The file name, the caption, and the tiles in rows of at most `COLUMNS`.
    """
    factor = TILE_PX / max(photo.size)
    tile = photo.resize((max(1, round(photo.width * factor)), max(1, round(photo.height * factor))))
    overlays = [
        images.overlay(tile, images.scaled(attention_map, 1.0), (0, 0, *tile.size)) for attention_map in weights
    ]
    captions = ["photo", *tokens]
    width = max(tile.width, MIN_COLUMN_PX, *(round(fonts.width(text, images.TEXT_PX)) + 1 for text in captions))
    tiles = [images.captioned(image, text, width) for text, image in zip(captions, [tile, *overlays], strict=True)]
    return images.titled(images.strip(tiles, COLUMNS), f"attention by word: {name}", f'"{" ".join(tokens)}"')
