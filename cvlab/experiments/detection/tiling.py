"""Tiled inference on large photos: a detector sees overlapping tiles and the whole photo, and the boxes are merged.

Paper: Akyon et al., 2022, "Slicing aided hyper inference and fine-tuning for small object detection" (SAHI).

Differences from the paper: boxes that a tile's border cuts are not merged by overlap alone. One that is a part of a
complete box is dropped; two of overlapping tiles are one object if they agree on the area that both tiles see, and
become the box around both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from cvlab.ops import boxes, nms
from cvlab.ops.average_precision import Detections

OVERLAP = 0.25  # of the side of a tile; SAHI: 0.2
MAX_TILES_PER_SIDE = 8  # of automatic tiles along the longer side, about
BORDER_FRACTION = 0.02  # of the side of a tile: a box this close to a border is cut by it
MATCH_IOU = 0.5  # of two cut boxes in the area that both tiles see, for one object
COVERED_FRACTION = 0.5  # of a cut box's area inside a complete box, for one object
MAX_CANDIDATES = 4000  # boxes of all tiles together that are merged: pairs of them take memory
Tile = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the photo
PredictFn = Callable[[Sequence[Image.Image], float, float], list[Detections]]


def tile_side(tile: int | Literal["auto"], photo_size: tuple[int, int], input_px: int) -> int:
    """Return the side of a photo's tiles in pixels.

    Args:
        tile: The side; `auto`: that of the detector's input, so that small objects are seen at full resolution, or
            more if the photo would have more than about `MAX_TILES_PER_SIDE` tiles in a row.
        photo_size: Width and height of the photo.
        input_px: Side of the detector's input.
    """
    if tile != "auto":
        return tile
    return max(input_px, round(max(photo_size) / (1 + (MAX_TILES_PER_SIDE - 1) * (1 - OVERLAP))))


def tiles_of(photo_size: tuple[int, int], side_px: int) -> list[Tile]:
    """Return the tiles that cover a photo of `photo_size` (width, height), row by row; none if it fits into one tile.

    Neighbors overlap by at least `OVERLAP` of their side. Tiles are squares, cut off where the photo is narrower.
    """
    width, height = photo_size
    if max(width, height) <= side_px:
        return []
    columns, rows = _starts(width, side_px), _starts(height, side_px)
    return [(x, y, min(x + side_px, width), min(y + side_px, height)) for y in rows for x in columns]


def _starts(length: int, side_px: int) -> list[int]:
    """Return where tiles begin along an axis, evenly spaced from the first to the last pixel."""
    if length <= side_px:
        return [0]
    step = max(1.0, side_px * (1 - OVERLAP))
    count = 1 + -int((side_px - length) // step)
    return [round(k * (length - side_px) / (count - 1)) for k in range(count)]


def tiled(predict: PredictFn, tile: int | Literal["auto"], input_px: int, batch_size: int) -> PredictFn:
    """Return a function that predicts as `predict` does, on each photo's tiles and the whole photo.

    Args:
        predict: `predict(photos, score_threshold, nms_iou)`.
        tile: Side of the tiles in pixels, or `auto`; see `tile_side`.
        input_px: Side of the detector's input.
        batch_size: Number of tiles that are predicted at a time.
    """

    def predict_one(image: Image.Image, score_threshold: float, nms_iou: float) -> Detections:
        whole: Tile = (0, 0, image.width, image.height)
        views = [whole, *tiles_of(image.size, tile_side(tile, image.size, input_px))]
        parts: list[Detections] = []
        for start in range(0, len(views), batch_size):
            crops = [image.crop(view) for view in views[start : start + batch_size]]
            parts += predict(crops, score_threshold, nms_iou)
        if len(views) == 1:
            return parts[0]
        return merge(parts, views, image.size, nms_iou)

    def predict_tiled(images: Sequence[Image.Image], score_threshold: float, nms_iou: float) -> list[Detections]:
        return [predict_one(image, score_threshold, nms_iou) for image in images]

    return predict_tiled


@dataclass(frozen=True)
class _Boxes:
    """Boxes in pixels of the photo, with the tile that each was seen in: both (N, 4); scores and labels (N,)."""

    boxes_xyxy: Tensor
    tiles_xyxy: Tensor
    scores: Tensor
    labels: Tensor

    def __getitem__(self, keep: Tensor) -> "_Boxes":
        return _Boxes(self.boxes_xyxy[keep], self.tiles_xyxy[keep], self.scores[keep], self.labels[keep])


def merge(
    parts: Sequence[Detections], tiles: Sequence[Tile], photo_size: tuple[int, int], nms_iou: float
) -> Detections:
    """Merge the detections of overlapping tiles, so that one object has one box.

    Args:
        parts: The detections of each tile, in its pixels.
        tiles: The tiles; the whole photo may be one of them.
        photo_size: Width and height of the photo.
        nms_iou: Nms iou of complete boxes of one class that overlap by more, the highest-scoring one stays.

    Returns:
        The detections in pixels of the photo, highest score first.
    """
    shifts = [part.boxes_xyxy.new_tensor([x, y, x, y]) for part, (x, y, *_) in zip(parts, tiles, strict=True)]
    seen = _Boxes(
        torch.cat([part.boxes_xyxy + shift for part, shift in zip(parts, shifts, strict=True)]),
        torch.cat(
            [
                part.boxes_xyxy.new_tensor(tile).expand(len(part.scores), 4)
                for part, tile in zip(parts, tiles, strict=True)
            ]
        ),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.labels for part in parts]),
    )
    seen = seen[seen.scores.argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
    is_cut = _touches_inner_border(seen, photo_size)
    complete = seen[~is_cut]
    complete = complete[nms.batched_nms(complete.boxes_xyxy, complete.scores, complete.labels, nms_iou)]
    cut = seen[is_cut]
    cut = cut[~_is_covered(cut, complete)]
    groups = [_join(cut, group) for group in _same_objects(cut)]
    joined = _largest(groups)
    merged = [complete, *joined]
    scores = torch.cat([item.scores for item in merged])
    order = torch.argsort(scores, descending=True, stable=True)
    return Detections(
        torch.cat([item.boxes_xyxy for item in merged])[order],
        scores[order],
        torch.cat([item.labels for item in merged])[order],
    )


def _touches_inner_border(seen: _Boxes, photo_size: tuple[int, int]) -> Tensor:
    """Return which boxes (N,) reach a border of their tile that is not one of the photo."""
    tiles = seen.tiles_xyxy
    limits = tiles.new_tensor([0, 0, *photo_size])
    margin = BORDER_FRACTION * (tiles[:, 2:] - tiles[:, :2]).amax(1, keepdim=True)
    return (((seen.boxes_xyxy - tiles).abs() <= margin) & (tiles != limits)).any(1)


def _is_covered(cut: _Boxes, complete: _Boxes) -> Tensor:
    """Return which of the cut boxes (N,) are parts of complete boxes.

    They lie, for the greater part, in one of the same class; or they are what their tile sees of one of any class,
    because a part of an object may look like another object.
    """
    fractions = boxes.paired_coverage(cut.boxes_xyxy[:, None], complete.boxes_xyxy)
    of_class = (fractions >= COVERED_FRACTION) & (cut.labels[:, None] == complete.labels)
    seen = _clip(complete.boxes_xyxy, cut.tiles_xyxy[:, None])
    return (of_class | (boxes.paired_iou(cut.boxes_xyxy[:, None], seen) >= MATCH_IOU)).any(1)


def _clip(boxes_xyxy: Tensor, tiles_xyxy: Tensor) -> Tensor:
    """Return the part of boxes (..., 4) in tiles (..., 4), which are broadcast; without area where there is none."""
    low = torch.maximum(boxes_xyxy[..., :2], tiles_xyxy[..., :2])
    return torch.cat([low, torch.minimum(boxes_xyxy[..., 2:], tiles_xyxy[..., 2:])], -1)


def _same_objects(cut: _Boxes) -> Iterator[list[int]]:
    """Yield the indices of cut boxes that show one object: those that agree where their tiles overlap, in chains."""
    shared = _clip(cut.tiles_xyxy[:, None], cut.tiles_xyxy)  # (N, N, 4)
    clipped = _clip(cut.boxes_xyxy[:, None], shared)
    agree = boxes.paired_iou(clipped, clipped.transpose(0, 1)) >= MATCH_IOU  # 0 for tiles that do not overlap
    other_tile = (cut.tiles_xyxy[:, None] != cut.tiles_xyxy).any(2)
    agree &= other_tile & (cut.labels[:, None] == cut.labels)
    remaining = set(range(len(cut.scores)))
    while remaining:
        group, queue = [], [min(remaining)]
        remaining.discard(queue[0])
        while queue:
            group.append(queue.pop())
            neighbors = remaining.intersection(agree[group[-1]].nonzero()[:, 0].tolist())
            remaining -= neighbors
            queue += sorted(neighbors)
        yield sorted(group)


def _join(cut: _Boxes, group: Sequence[int]) -> _Boxes:
    """Return the box around the boxes of a group, with their highest score."""
    part = cut[torch.tensor(group)]
    best = part.scores.argmax()[None]
    around = torch.cat([part.boxes_xyxy[:, :2].amin(0), part.boxes_xyxy[:, 2:].amax(0)])
    return _Boxes(around[None], part.tiles_xyxy[best], part.scores[best], part.labels[best])


def _largest(groups: Sequence[_Boxes]) -> list[_Boxes]:
    """Return the joined boxes without those that lie, for the greater part, in a larger one of the same class."""
    result: list[_Boxes] = []
    for group in sorted(groups, key=lambda group: -float(boxes.area(group.boxes_xyxy))):
        if not any(bool(_is_covered(group, larger)) for larger in result):
            result.append(group)
    return result
