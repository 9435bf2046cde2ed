"""Task-aligned label assignment: which feature-map locations are positive for which ground-truth box.

References:
    Feng et al., 2021, "TOOD: task-aligned one-stage object detection", section 3.2: a location is ranked for a box by
    score^alpha * IoU^beta, its classification score and the IoU of the box that it predicts.

Differences from the paper:
    alpha is 0.5, as in YOLOv8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.ops import boxes

ALPHA, BETA = 0.5, 6.0
TOP_K = 10  # locations for each box
EPS = 1e-38


@dataclass(frozen=True)
class Assignment:
    """The positive locations of a batch.

    `image`, `point` and `box` are int64 (K,): the image, the location of `grid_points` and the ground-truth box that
    it is assigned to. `quality` (K,) in [0, 1] is the classification target: the normalized alignment metric.
    """

    image: Tensor
    point: Tensor
    box: Tensor
    quality: Tensor


def grid_points(shapes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """Return the centers of the cells of feature maps of several levels.

    Args:
        shapes: Height and width of each level's feature map.
        strides: Stride of each level in pixels.

    Returns:
        points (P, 3): x, y and stride in pixels, level by level, row by row.
    """
    levels = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        levels.append(torch.stack([x * stride, y * stride, torch.full_like(x, stride)], -1).view(-1, 3))
    return torch.cat(levels)


def assign_task_aligned(
    scores: Tensor, boxes_xyxy: Tensor, points: Tensor, gt_boxes_xyxy: Tensor, gt_labels: Tensor, top_k: int = TOP_K
) -> Assignment:
    """Assign to each ground-truth box up to `top_k` of the locations inside of it, by the alignment metric.

    A location that is among the best of several boxes goes to the one that its prediction overlaps most. A box so
    small that no location lies inside of it gets the nearest one.

    Args:
        scores: (N, P, C) in [0, 1], predicted scores of the classes.
        boxes_xyxy: (N, P, 4) in pixels, predicted boxes.
        points: (P, 3) of `grid_points`.
        gt_boxes_xyxy: (N, M, 4) in pixels, padded.
        gt_labels: int64 (N, M), -1 for padding.
        top_k: The largest number of locations for a box.

    Returns:
        The positive locations.
    """
    n, num_gt = gt_labels.shape
    num_points = points.shape[0]
    # Only pairs of a box and a location inside of it can be chosen, a small share of all pairs.
    inside = _inside(points, gt_boxes_xyxy, gt_labels >= 0)  # (N, M, P)
    image, box, point = inside.nonzero(as_tuple=True)
    iou = boxes.paired_iou(boxes_xyxy[image, point], gt_boxes_xyxy[image, box])
    alignment = scores[image, point, gt_labels[image, box]].pow(ALPHA) * iou.pow(BETA)
    dense = torch.full(inside.shape, -1.0, device=alignment.device)
    dense[image, box, point] = alignment
    kth_best = dense.topk(min(top_k, dense.shape[2]), 2).values[..., -1]  # (N, M)
    keep = alignment >= kth_best[image, box]
    image, box, point, iou, alignment = (values[keep] for values in (image, box, point, iou, alignment))
    best_iou = torch.full((n, num_points), -1.0, device=alignment.device)
    best_iou = best_iou.view(-1).scatter_reduce(0, image * num_points + point, iou, "amax").view(best_iou.shape)
    keep = iou >= best_iou[image, point]
    image, box, point, iou, alignment = (values[keep] for values in (image, box, point, iou, alignment))
    keep = _is_first(image * num_points + point)  # of boxes that a location overlaps equally
    image, box, point, iou, alignment = (values[keep] for values in (image, box, point, iou, alignment))
    pair = image * num_gt + box
    max_alignment = torch.zeros(n * num_gt, device=alignment.device).scatter_reduce(0, pair, alignment, "amax")
    max_iou = torch.zeros(n * num_gt, device=alignment.device).scatter_reduce(0, pair, iou, "amax")
    quality = alignment / max_alignment[pair].clamp(min=EPS) * max_iou[pair]
    return Assignment(image, point, box, quality)


def _inside(points: Tensor, gt_boxes_xyxy: Tensor, is_box: Tensor) -> Tensor:
    """Return which points lie inside of which boxes, bool (N, M, P); the nearest one where none does."""
    x, y = points[:, 0], points[:, 1]
    left, top, right, bottom = gt_boxes_xyxy[..., None].unbind(2)  # (N, M, 1)
    inside = (x > left) & (x < right) & (y > top) & (y < bottom) & is_box[..., None]  # (N, M, P)
    has_none = is_box & ~inside.any(2)
    if bool(has_none.any()):
        image, box = has_none.nonzero(as_tuple=True)
        center = (gt_boxes_xyxy[image, box, :2] + gt_boxes_xyxy[image, box, 2:]) / 2
        distance = torch.cdist(center, points[:, :2]) + points[:, 2]  # of equally near ones the finest level
        inside[image, box, distance.argmin(1)] = True
    return inside


def _is_first(keys: Tensor) -> Tensor:
    """Return which elements of int64 keys (K,) are the first of their value."""
    order = torch.arange(len(keys), device=keys.device)
    first = torch.full((int(keys.max()) + 1 if len(keys) else 0,), len(keys), device=keys.device)
    first = first.scatter_reduce(0, keys, order, "amin")
    return first[keys] == order
