"""Greedy non-maximum suppression, vectorized in blocks.

Differences from the loop over boxes: the boxes of a block are compared with each other and with all that follow as
matrices, in tiles that stay in the cache. Within a block the greedy choice is the fixed point of one product.
"""

import torch
from torch import Tensor

from cvlab.ops import boxes

BLOCK_SIZE = 256  # boxes that are decided at a time
TILE_SIZE = 512  # boxes that a block is compared with at a time


def nms(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, max_detections: int | None = None) -> Tensor:
    """Keep the highest-scoring boxes and remove those that overlap one that is kept.

    Args:
        boxes_xyxy: (N, 4).
        scores: (N,).
        iou_threshold: A box is removed if its IoU with a kept, higher-scoring one is greater than this.
        max_detections: The largest number of boxes to keep; None keeps all.

    Returns:
        keep: int64 indices (K,) by descending score, of equal scores in the order of the boxes.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    return order[_greedy(boxes_xyxy[order].detach(), iou_threshold, max_detections)]


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int | None = None
) -> Tensor:
    """Apply `nms` to each class by itself: a box is removed only for one of its own class.

    Args:
        boxes_xyxy: (N, 4).
        scores: (N,).
        labels: int64 (N,).
        iou_threshold: As in `nms`.
        max_detections: The largest number of boxes to keep of all classes together; None keeps all.

    Returns:
        keep: int64 indices (K,) by descending score, of equal scores in the order of the boxes.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)  # in the order of the scores
    sorted_labels = labels[order]
    for label in sorted_labels.unique():
        of_class = (sorted_labels == label).nonzero()[:, 0]
        keep[of_class[_greedy(boxes_xyxy[order[of_class]].detach(), iou_threshold, max_detections)]] = True
    return order[keep][:max_detections]


@torch.no_grad()
def _greedy(boxes_xyxy: Tensor, iou_threshold: float, max_detections: int | None) -> Tensor:
    """Return the indices, ascending, of the boxes (N, 4) to keep; boxes come by descending score."""
    boxes_xyxy = boxes_xyxy.to(torch.promote_types(boxes_xyxy.dtype, torch.float32))  # areas overflow float16
    columns = torch.cat([boxes_xyxy, boxes.area(boxes_xyxy)[:, None]], 1).T.contiguous()  # (5, N)
    remaining = torch.arange(columns.shape[1], device=columns.device)
    scratch = columns.new_empty(3, BLOCK_SIZE * TILE_SIZE)
    keep = [remaining[:0]]
    while len(remaining) and (max_detections is None or sum(map(len, keep)) < max_detections):
        block = columns[:, :BLOCK_SIZE]
        is_kept = _greedy_in_block(_overlaps(block, block, iou_threshold, scratch))
        keep.append(remaining[:BLOCK_SIZE][is_kept])
        rows, columns, remaining = block[:, is_kept], columns[:, BLOCK_SIZE:], remaining[BLOCK_SIZE:]
        tiles = columns.split(TILE_SIZE, 1) if len(remaining) else ()
        suppressed = [_overlaps(rows, tile, iou_threshold, scratch).any(0) for tile in tiles]
        if suppressed:
            survivors = (~torch.cat(suppressed)).nonzero()[:, 0]
            columns, remaining = columns[:, survivors], remaining[survivors]
    return torch.cat(keep)[:max_detections]


def _overlaps(rows: Tensor, columns: Tensor, iou_threshold: float, scratch: Tensor) -> Tensor:
    """Return which pairs of rows (5, R) and columns (5, C), coordinates and area, are duplicates: bool (R, C)."""
    r, c = rows.shape[1], columns.shape[1]
    low, high, intersection = (part[: r * c].view(r, c) for part in scratch)
    torch.minimum(rows[2][:, None], columns[2], out=high)
    torch.maximum(rows[0][:, None], columns[0], out=low)
    torch.sub(high, low, out=intersection).clamp_(min=0)
    torch.minimum(rows[3][:, None], columns[3], out=high)
    torch.maximum(rows[1][:, None], columns[1], out=low)
    intersection.mul_(high.sub_(low).clamp_(min=0))
    union = torch.add(rows[4][:, None], columns[4], out=low).sub_(intersection)
    is_duplicate: Tensor = intersection.div_(union) > iou_threshold  # never for 0 / 0, boxes without area
    return is_duplicate


def _greedy_in_block(is_duplicate: Tensor) -> Tensor:
    """Return which boxes (B,) of a block to keep, from which pairs (B, B) are duplicates; by descending score.

    A box is kept unless it duplicates a kept one before it. Starting from all, each round decides at least one more.
    """
    before = is_duplicate.triu(1).float()
    keep = torch.ones(len(is_duplicate), device=is_duplicate.device)
    while True:
        next_keep = ((keep @ before) == 0).float()
        if next_keep.equal(keep):
            return keep.bool()
        keep = next_keep
