"""Anchors: boxes of fixed shapes around the cells of a map, and which of them answers for which box.

Papers: Redmon et al., 2016, "You only look once" (the cell of a box's middle answers for it); Ren et al., 2015,
"Faster R-CNN", section 3.1.2 (positive and negative by overlap). Differs: the shapes and the 7x7 map are a course's;
one anchor answers for a box, and which cell is nearest is told by Manhattan distance. One cell is one unit.
"""

import torch
from torch import Tensor

from cvlab.ops import boxes

COURSE_SHAPES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (2, 3), (3, 2), (3, 5), (5, 3))  # width, height in cells


def grid_centers(height: int, width: int) -> Tensor:
    """Return the middles of the cells of a map: (H, W, 2), x and y in cells, at 0.5, 1.5, ..."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y], -1)  # (H, W, 2)


def generate_anchors(centres: Tensor, shapes: Tensor) -> Tensor:
    """Return anchors_xyxy (A, H, W, 4) in cells: boxes of shapes (A, 2), width and height, around centres (H, W, 2)."""
    half = shapes.to(centres)[:, None, None] / 2  # (A, 1, 1, 2)
    return torch.cat([centres - half, centres + half], -1)  # (A, H, W, 4)


def match_anchors_to_boxes(boxes_xyxy: Tensor, centres: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Return which anchor answers for each box (M, 4) of one picture: int64 (M,), and its IoU (M,) in [0, 1].

    The cell whose centre is nearest to the box's by Manhattan distance, and its anchor of highest IoU; of equal ones
    the first. The index is into anchors (A, H, W) made flat: (anchor * H + row) * W + column. Two boxes may get the
    same. All in cells.
    """
    height, width, _ = centres.shape
    middle = (boxes_xyxy[:, None, :2] + boxes_xyxy[:, None, 2:]) / 2  # (M, 1, 2)
    cell = (middle - centres.reshape(1, -1, 2)).abs().sum(-1).argmin(1)  # (M,)
    anchors = generate_anchors(centres, shapes).flatten(1, 2)[:, cell]  # (A, M, 4)
    overlap, anchor = boxes.paired_iou(anchors, boxes_xyxy).max(0)  # (M,)
    return anchor * height * width + cell, overlap


def match_by_iou(iou: Tensor, high: float, low: float) -> tuple[Tensor, Tensor]:
    """Return what each of N anchors is, int64 (N,): 1 positive, 0 negative, -1 neither; and its box, int64 (N,).

    iou: (N, M) in [0, 1] of anchors and boxes. Positive: IoU > high, or the highest IoU of a box, if it is not 0 (all
    that share it). Negative: IoU < low with all boxes. The box of an anchor is the one it overlaps most, but where it
    is positive only as the best of a box, that box; of equal ones the first. Without boxes all are negative, box 0.
    """
    n, m = iou.shape
    if not n or not m:
        none = torch.zeros(n, dtype=torch.int64, device=iou.device)
        return none, none.clone()
    most, box = iou.max(1)  # (N,)
    labels = torch.where(most < low, 0, -1)
    is_best = (iou == iou.amax(0)) & (iou > 0)  # (N, M)
    is_high = most > high
    forced = is_best.any(1) & ~is_high
    # A box whose only anchors lie below `high` keeps them even where they overlap another box more.
    best_box = torch.where(is_best, iou, -1.0).argmax(1)
    box = torch.where(forced, best_box, box)
    return labels.masked_fill(is_high | forced, 1), box


def negative_mask(iou: Tensor, low: float = 0.2) -> Tensor:
    """Return which anchors stand for no object: bool (..., P), where the IoU (..., P, M) with every box is below `low`.

    Without boxes all of them.
    """
    return (iou < low).all(-1)
