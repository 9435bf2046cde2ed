"""Boxes: conversions, areas, overlaps. A box is four numbers; names say which: xyxy are left, top, right, bottom.

Paper: Rezatofighi et al., 2019, "Generalized intersection over union" (giou).
"""

import torch
from torch import Tensor


def area(boxes_xyxy: Tensor) -> Tensor:
    """Return the areas (N,) of boxes (N, 4); 0 for one turned inside out."""
    return _extent(boxes_xyxy[..., :2], boxes_xyxy[..., 2:])


def _extent(low: Tensor, high: Tensor) -> Tensor:
    """Return the area between two corners (..., 2)."""
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]  # the gradient of prod(-1) would wait for the GPU


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, 0 where the whole has no area; gradients stay finite there."""
    return part / whole.masked_fill(whole <= 0, 1)


def _overlap(boxes_xyxy: Tensor, others_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return what two boxes share and what they cover together; the arguments are broadcast."""
    low = torch.maximum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    high = torch.minimum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    shared = _extent(low, high)
    return shared, area(boxes_xyxy) + area(others_xyxy) - shared


def _giou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    shared, together = _overlap(boxes_xyxy, others_xyxy)
    low = torch.minimum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    high = torch.maximum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    around = _extent(low, high)
    return _share(shared, together) - _share(around - together, around)


def paired_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Return the intersection over union (N,), in [0, 1], of boxes (N, 4) with others, one by one; 0 without area."""
    shared, together = _overlap(boxes_xyxy, others_xyxy)
    return _share(shared, together)


def paired_giou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Return the generalised intersection over union (N,), in [-1, 1], of boxes (N, 4) with others, one by one."""
    return _giou(boxes_xyxy, others_xyxy)


def iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Return the intersection over union (N, M), in [0, 1], of boxes (N, 4) and others (M, 4); 0 without area."""
    return paired_iou(boxes_xyxy[:, None], others_xyxy[None])


def giou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Return the generalised intersection over union (N, M), in [-1, 1], of boxes (N, 4) and others (M, 4)."""
    return _giou(boxes_xyxy[:, None], others_xyxy[None])


def clip(boxes_xyxy: Tensor, width: float, height: float) -> Tensor:
    """Return boxes (N, 4) cut at the edges of a picture: x in [0, width], y in [0, height]."""
    most = boxes_xyxy.new_tensor([width, height, width, height])
    return boxes_xyxy.clamp(min=0).minimum(most)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert to middle x, middle y, width, height."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert from middle x, middle y, width, height."""
    middle, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1)


def xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """Convert from left, top, width, height, as COCO has them."""
    return torch.cat([boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]], -1)
