"""Which points of a detector's maps are responsible for which box.

Paper: Feng et al., 2021, "TOOD: task-aligned one-stage object detection", section 3.2: a point is the better for a box,
the surer it is of the class and the better its box fits: score^alpha * IoU^beta. Differs: alpha 0.5, as in YOLOv8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.ops import boxes

ALPHA, BETA, TOP_K = 0.5, 6.0, 10
EPS = 1e-38


@dataclass(frozen=True)
class Assignment:
    """The responsible points: image, point and box of each, int64 (K,), and how sure it is to be, (K,) in [0, 1]."""

    image: Tensor
    point: Tensor
    box: Tensor
    quality: Tensor


def grid_points(shapes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """Return the middles of all cells of maps of shapes (H, W): (P, 3) with x, y and stride in pixels, row by row."""
    made = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        made.append(torch.stack([x * stride, y * stride, torch.full_like(x, stride)], -1).view(-1, 3))
    return torch.cat(made)


def assign_task_aligned(
    scores: Tensor, boxes_xyxy: Tensor, places: Tensor, wanted_xyxy: Tensor, labels: Tensor, most: int = TOP_K
) -> Assignment:
    """Choose for each box up to `most` of the points inside of it; a point that several want goes to the best fit.

    scores: (N, P, C) in [0, 1]; boxes_xyxy: (N, P, 4), what is predicted; places: (P, 3) of `points`; wanted_xyxy:
    (N, M, 4); labels (N, M), -1 where there is none. A box so small that no point lies inside takes the nearest one.
    """
    n, m = labels.shape
    is_box = labels >= 0
    x, y = places[:, 0], places[:, 1]
    left, top, right, bottom = wanted_xyxy[..., None].unbind(2)  # (N, M, 1)
    inside = (x > left) & (x < right) & (y > top) & (y < bottom) & is_box[..., None]  # (N, M, P)
    alone = is_box & ~inside.any(2)
    if bool(alone.any()):
        image, box = alone.nonzero(as_tuple=True)
        middle = (wanted_xyxy[image, box, :2] + wanted_xyxy[image, box, 2:]) / 2
        nearest = torch.cdist(middle, places[:, :2]) + places[:, 2]  # of equally near ones the finest
        inside[image, box, nearest.argmin(1)] = True
    # Only these pairs can be chosen, a small share of all of them.
    image, box, point = inside.nonzero(as_tuple=True)
    overlap = boxes.paired_iou(boxes_xyxy[image, point], wanted_xyxy[image, box])
    fit = scores[image, point, labels[image, box]].pow(ALPHA) * overlap.pow(BETA)
    dense = torch.full(inside.shape, -1.0, device=fit.device)
    dense[image, box, point] = fit
    lowest = dense.topk(min(most, dense.shape[2]), 2).values[..., -1]  # (N, M)
    taken = fit >= lowest[image, box]
    image, box, point, overlap, fit = (values[taken] for values in (image, box, point, overlap, fit))
    best = torch.full((n, places.shape[0]), -1.0, device=fit.device)
    best = best.view(-1).scatter_reduce(0, image * places.shape[0] + point, overlap, "amax").view(best.shape)
    wins = overlap >= best[image, point]
    image, box, point, overlap, fit = (values[wins] for values in (image, box, point, overlap, fit))
    image, box, point, overlap, fit = _first_of_each(image, box, point, overlap, fit, places.shape[0])
    pair = image * m + box
    most_fit = torch.zeros(n * m, device=fit.device).scatter_reduce(0, pair, fit, "amax")
    most_overlap = torch.zeros(n * m, device=fit.device).scatter_reduce(0, pair, overlap, "amax")
    quality = fit / most_fit[pair].clamp(min=EPS) * most_overlap[pair]
    return Assignment(image, point, box, quality)


def _first_of_each(
    image: Tensor, box: Tensor, point: Tensor, overlap: Tensor, fit: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Leave each point to one box only, where two fit it equally well."""
    flat = image * count + point
    order = torch.arange(len(flat), device=flat.device)
    first = torch.full((int(flat.max()) + 1 if len(flat) else 0,), len(flat), device=flat.device)
    first = first.scatter_reduce(0, flat, order, "amin")
    keep = first[flat] == order
    return image[keep], box[keep], point[keep], overlap[keep], fit[keep]
