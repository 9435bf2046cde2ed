"""Which pixels of a photo a number depends on: by how much it falls when a square of the photo is covered.

References:
    Zeiler and Fergus, 2014, "Visualizing and understanding convolutional networks", section 4.2; Petsiuk et al., 2021,
    "Black-box explanation of object detectors via saliency maps" (the score of a detection).
"""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from cvlab.experiments.common.photo_batches import CheckInterrupt
from cvlab.reports import images as reports_images

Scores = Callable[[Sequence[Image.Image]], Tensor]  # of photos of one size: float32 (N,)
MAX_MAP_PX = 512  # longer side of a map; the squares are covered in the photo itself
GRAY = (114, 114, 114)  # of covered pixels; what detectors have around photos


def occlusion_map(
    scores: Scores, photo: Image.Image, window: float, batch_size: int, check_interrupt: CheckInterrupt
) -> Tensor:
    """Return by how much a score falls when a square is covered, averaged over the squares that cover a pixel.

    Args:
        scores: Returns the scores of a batch of photos.
        photo: RGB.
        window: Side of the square, as a fraction of the photo's longer side; it moves by half of it.
        batch_size: Number of photos in a batch.
        check_interrupt: Called before each batch.

    Returns:
        Map (h, w), signed; its longer side has at most MAX_MAP_PX pixels.
    """
    factor = max(1.0, max(photo.size) / MAX_MAP_PX)
    width, height = (max(1, round(side / factor)) for side in photo.size)
    side_px = max(1, round(window * max(width, height)))
    corners = [(left, top) for top in _starts(height, side_px) for left in _starts(width, side_px)]
    before = float(scores([photo])[0])
    total, count = torch.zeros(height, width), torch.zeros(height, width)
    for first in range(0, len(corners), batch_size):
        check_interrupt("covering squares", first / len(corners))
        batch = corners[first : first + batch_size]
        covered = [_cover(photo, left, top, side_px, (width, height)) for left, top in batch]
        for (left, top), score in zip(batch, scores(covered).tolist(), strict=True):
            total[top : top + side_px, left : left + side_px] += before - score
            count[top : top + side_px, left : left + side_px] += 1
    return total / count


def _starts(length: int, side_px: int) -> list[int]:
    """Return where squares begin along an axis: evenly, by at most half of their side, from edge to edge."""
    last = max(0, length - side_px)
    steps = math.ceil(2 * last / side_px)
    return sorted({round(k * last / steps) for k in range(steps + 1)}) if steps else [0]


def _cover(photo: Image.Image, left: int, top: int, side_px: int, map_size: tuple[int, int]) -> Image.Image:
    """Return a photo with a square of a map of it covered."""
    scale_x, scale_y = photo.width / map_size[0], photo.height / map_size[1]
    right, bottom = min(left + side_px, map_size[0]), min(top + side_px, map_size[1])
    covered = photo.copy()
    covered.paste(GRAY, (round(left * scale_x), round(top * scale_y), round(right * scale_x), round(bottom * scale_y)))
    return covered


def draw(photo: Image.Image, marked: tuple[str, Image.Image], values: Tensor, caption: str, title: str) -> Image.Image:
    """Return a panel of a captioned picture of what is explained, the positive part of a map, and its overlay."""
    scaled = reports_images.scaled(values)
    tiles = [marked, *reports_images.saliency_tiles(caption, photo, scaled, (0, 0, *photo.size))]
    return reports_images.panel(tiles, title, has_color_bar=True)
