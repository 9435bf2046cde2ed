"""Anchor boxes on a feature map, and their assignment to ground-truth boxes.

References:
    Redmon et al., 2016, "You only look once", section 2 (the grid cell at a box's center is responsible for it).
    Ren et al., 2015, "Faster R-CNN", section 3.1.2 (positive and negative anchors by IoU).

Differences from the paper:
    The anchor shapes and the 7x7 map are those of EECS 498, assignment 5. `match_anchors_to_boxes` assigns one anchor
    to each box and finds the nearest cell by Manhattan distance. Coordinates are in cells of the feature map.
"""

import torch
from torch import Tensor

from cvlab.ops import boxes

COURSE_SHAPES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (2, 3), (3, 2), (3, 5), (5, 3))  # width, height in cells


def grid_centers(height: int, width: int) -> Tensor:
    """Return the centers of the cells of a feature map.

    Args:
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        centers (H, W, 2): x and y of each cell, at 0.5, 1.5, ...
    """
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y], -1)  # (H, W, 2)


def generate_anchors(centers: Tensor, shapes: Tensor) -> Tensor:
    """Return an anchor of every shape around every center.

    Args:
        centers: (H, W, 2), x and y in cells.
        shapes: (A, 2), width and height in cells.

    Returns:
        anchors_xyxy (A, H, W, 4) in cells.
    """
    half = shapes.to(centers)[:, None, None] / 2  # (A, 1, 1, 2)
    return torch.cat([centers - half, centers + half], -1)  # (A, H, W, 4)


def match_anchors_to_boxes(boxes_xyxy: Tensor, centers: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Assign one anchor to each ground-truth box: of the nearest cell, the anchor with the highest IoU.

    The nearest cell is the one whose center has the smallest Manhattan distance to the box's center. Ties take the
    first cell and the first anchor. Two boxes may be assigned the same anchor.

    Args:
        boxes_xyxy: (M, 4), the ground-truth boxes of one image, in cells.
        centers: (H, W, 2) of `grid_centers`.
        shapes: (A, 2), width and height in cells.

    Returns:
        anchor_index: int64 (M,), into the flattened anchors (A, H, W): (anchor * H + row) * W + column.
        iou: (M,) in [0, 1], of each box with its anchor.
    """
    height, width, _ = centers.shape
    box_centers = (boxes_xyxy[:, None, :2] + boxes_xyxy[:, None, 2:]) / 2  # (M, 1, 2)
    cell = (box_centers - centers.reshape(1, -1, 2)).abs().sum(-1).argmin(1)  # (M,)
    anchors = generate_anchors(centers, shapes).flatten(1, 2)[:, cell]  # (A, M, 4)
    iou, anchor = boxes.paired_iou(anchors, boxes_xyxy).max(0)  # (M,)
    return anchor * height * width + cell, iou


def match_by_iou(iou: Tensor, high: float, low: float) -> tuple[Tensor, Tensor]:
    """Label anchors as positive, negative or neither by their IoU with the ground-truth boxes.

    An anchor is positive if its IoU with a box exceeds `high`, or if no anchor overlaps some box more (and the IoU is
    not 0; ties are all positive). It is negative if its IoU with every box is below `low`. Without boxes all anchors
    are negative.

    Args:
        iou: (N, M) in [0, 1], of N anchors with M boxes.
        high: IoU above which an anchor is positive, in [0, 1].
        low: IoU below which an anchor is negative, in [0, 1].

    Returns:
        labels: int64 (N,), 1 positive, 0 negative, -1 neither.
        box_index: int64 (N,), the box that each anchor overlaps most, of equal ones the first. An anchor that is
            positive only because it is a box's best one gets that box; without boxes the index is 0.
    """
    num_anchors, num_boxes = iou.shape
    if not num_anchors or not num_boxes:
        zeros = torch.zeros(num_anchors, dtype=torch.int64, device=iou.device)
        return zeros, zeros.clone()
    max_iou, box_index = iou.max(1)  # (N,)
    labels = torch.where(max_iou < low, 0, -1)
    is_best = (iou == iou.amax(0)) & (iou > 0)  # (N, M)
    is_high = max_iou > high
    is_forced = is_best.any(1) & ~is_high
    # A box whose only anchors lie below `high` keeps them even where they overlap another box more.
    best_box = torch.where(is_best, iou, -1.0).argmax(1)
    box_index = torch.where(is_forced, best_box, box_index)
    return labels.masked_fill(is_high | is_forced, 1), box_index


def negative_mask(iou: Tensor, low: float = 0.2) -> Tensor:
    """Return which anchors are background: those whose IoU with every box is below `low`.

    Args:
        iou: (..., P, M) in [0, 1], of P anchors with M boxes; without boxes all anchors are background.
        low: IoU threshold in [0, 1].

    Returns:
        is_negative: bool (..., P).
    """
    return (iou < low).all(-1)
