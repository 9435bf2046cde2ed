"""Box formats, areas and overlaps.

A box is four numbers whose meaning is in the variable's name: `xyxy` are left, top, right, bottom; `cxcywh` are
center x, center y, width, height.

References:
    Rezatofighi et al., 2019, "Generalized intersection over union", section 3 (GIoU).
"""

import torch
from torch import Tensor


def area(boxes_xyxy: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4); 0 for a box whose right is left of its left."""
    return _extent(boxes_xyxy[..., :2], boxes_xyxy[..., 2:])


def _extent(low: Tensor, high: Tensor) -> Tensor:
    """Return the area between two corners (..., 2)."""
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]  # the gradient of prod(-1) would wait for the GPU


def _safe_divide(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, 0 where the whole has no area; gradients stay finite there."""
    return part / whole.masked_fill(whole <= 0, 1)


def _intersection_and_union(boxes_xyxy: Tensor, other_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas of intersection and union of boxes (..., 4); the arguments are broadcast."""
    low = torch.maximum(boxes_xyxy[..., :2], other_xyxy[..., :2])
    high = torch.minimum(boxes_xyxy[..., 2:], other_xyxy[..., 2:])
    intersection = _extent(low, high)
    return intersection, area(boxes_xyxy) + area(other_xyxy) - intersection


def _giou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Return the GIoU of boxes (..., 4); the arguments are broadcast."""
    intersection, union = _intersection_and_union(boxes_xyxy, other_xyxy)
    low = torch.minimum(boxes_xyxy[..., :2], other_xyxy[..., :2])
    high = torch.maximum(boxes_xyxy[..., 2:], other_xyxy[..., 2:])
    enclosing = _extent(low, high)
    return _safe_divide(intersection, union) - _safe_divide(enclosing - union, enclosing)


def paired_iou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Return the intersection over union of boxes, element by element.

    Args:
        boxes_xyxy: (..., 4).
        other_xyxy: (..., 4); the arguments are broadcast.

    Returns:
        IoU (...) in [0, 1]; 0 where the union has no area.
    """
    intersection, union = _intersection_and_union(boxes_xyxy, other_xyxy)
    return _safe_divide(intersection, union)


def paired_coverage(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Return which fraction of each box another one covers, element by element.

    Args:
        boxes_xyxy: (..., 4).
        other_xyxy: (..., 4); the arguments are broadcast.

    Returns:
        intersection over the area of the first box (...) in [0, 1]; 0 where that has no area.
    """
    intersection, _ = _intersection_and_union(boxes_xyxy, other_xyxy)
    return _safe_divide(intersection, area(boxes_xyxy).expand_as(intersection))


def paired_giou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Return the generalized intersection over union of boxes, element by element.

    Args:
        boxes_xyxy: (..., 4).
        other_xyxy: (..., 4); the arguments are broadcast.

    Returns:
        GIoU (...) in [-1, 1].
    """
    return _giou(boxes_xyxy, other_xyxy)


def iou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Return the intersection over union of every pair of boxes.

    Args:
        boxes_xyxy: (N, 4).
        other_xyxy: (M, 4).

    Returns:
        IoU (N, M) in [0, 1]; 0 where the union has no area.
    """
    return paired_iou(boxes_xyxy[:, None], other_xyxy[None])


def giou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Return the generalized intersection over union of every pair of boxes.

    Args:
        boxes_xyxy: (N, 4).
        other_xyxy: (M, 4).

    Returns:
        GIoU (N, M) in [-1, 1].
    """
    return _giou(boxes_xyxy[:, None], other_xyxy[None])


def clip(boxes_xyxy: Tensor, width: float, height: float) -> Tensor:
    """Clip boxes to an image.

    Args:
        boxes_xyxy: (..., 4) in pixels.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        boxes_xyxy (..., 4): x in [0, width], y in [0, height].
    """
    limits = boxes_xyxy.new_tensor([width, height, width, height])
    return boxes_xyxy.clamp(min=0).minimum(limits)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert boxes (..., 4) from left, top, right, bottom to center x, center y, width, height."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert boxes (..., 4) from center x, center y, width, height to left, top, right, bottom."""
    center, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([center - half, center + half], -1)
