"""Attention maps of a caption: the photo, and the photo again for each word with its attention weights overlaid."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from cvlab.reports import fonts, images

TILE_PX = 224  # longer side of each tile
MIN_COLUMN_PX = 120
COLUMNS = 6
TOP_WEIGHT = 3.0  # the brightest color, in units of the uniform weight


def attention_sheet(photo: Image.Image, tokens: Sequence[str], weights: Tensor, name: str) -> Image.Image:
    """Draw a photo and, for each token, the photo with its attention map.

    Args:
        photo: The photo.
        tokens: The T tokens of the caption.
        weights: Attention weights (T, h, w) over the whole photo; drawn as `excess_over_uniform`.
        name: The photo's file name.

    Returns:
        The file name, the caption, and the tiles in rows of at most `COLUMNS`.
    """
    factor = TILE_PX / max(photo.size)
    tile = photo.resize((max(1, round(photo.width * factor)), max(1, round(photo.height * factor))))
    overlays = [
        images.overlay(tile, excess, (0, 0, *tile.size), stretch=False) for excess in excess_over_uniform(weights)
    ]
    captions = ["photo", *tokens]
    width = max(tile.width, MIN_COLUMN_PX, *(round(fonts.width(text, images.TEXT_PX)) + 1 for text in captions))
    tiles = [images.captioned(image, text, width) for text, image in zip(captions, [tile, *overlays], strict=True)]
    return images.titled(images.strip(tiles, COLUMNS), f"attention by word: {name}", f'"{" ".join(tokens)}"')


def excess_over_uniform(weights: Tensor) -> Tensor:
    """Return by how much attention exceeds uniform attention, on one scale for all words and photos.

    A map that is nearly uniform stays nearly 0 everywhere: it does not say where the model looks.

    Args:
        weights: Attention weights (T, h, w); each map sums to 1.

    Returns:
        float32 (T, h, w): 0 where a weight is at most 1 / (h w), 1 where it is at least `TOP_WEIGHT` times as much.
    """
    relative = weights.float() * weights[0].numel()
    return ((relative - 1) / (TOP_WEIGHT - 1)).clamp(0, 1)
