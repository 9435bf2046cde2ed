"""Leave out boxes that overlap a surer one: greedy non-maximum suppression, block by block.

Differs from the loop over boxes: those of a block are compared with each other and with all that come after as
matrices, in tiles that stay in the cache; the greedy chain within a block is the fixed point of one product.
"""

import torch
from torch import Tensor

from cvlab.ops import boxes

BLOCK_SIZE, TILE_SIZE = (
    256,
    512,
)  # boxes that are settled at a time, and with how many others they are compared at a time


def nms(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, max_detections: int | None = None) -> Tensor:
    """Return which boxes (N, 4) stay: int64 indices, by falling score, of equal ones the first.

    A box goes where it overlaps a surer one that stays with an IoU of more than the threshold.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    return order[_greedy(boxes_xyxy[order].detach(), iou_threshold, max_detections)]


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int | None = None
) -> Tensor:
    """Do the same for each class by itself: a box (label of (N,)) goes only for one of its own class."""
    order = torch.argsort(scores, descending=True, stable=True)
    stays = torch.zeros(len(order), dtype=torch.bool, device=order.device)  # in the order of the scores
    sorted_labels = labels[order]
    for label in sorted_labels.unique():
        places = (sorted_labels == label).nonzero()[:, 0]
        stays[places[_greedy(boxes_xyxy[order[places]].detach(), iou_threshold, max_detections)]] = True
    return order[stays][:max_detections]


@torch.no_grad()
def _greedy(boxes_xyxy: Tensor, threshold: float, max_detections: int | None) -> Tensor:
    """Return the places, in order, of the first `max_detections` boxes (N, 4) that stay; the surest come first."""
    boxes_xyxy = boxes_xyxy.to(torch.promote_types(boxes_xyxy.dtype, torch.float32))  # areas overflow float16
    columns = torch.cat([boxes_xyxy, boxes.area(boxes_xyxy)[:, None]], 1).T.contiguous()  # (5, N)
    alive = torch.arange(columns.shape[1], device=columns.device)
    scratch = columns.new_empty(3, BLOCK_SIZE * TILE_SIZE)
    kept = [alive[:0]]
    while len(alive) and (max_detections is None or sum(map(len, kept)) < max_detections):
        block = columns[:, :BLOCK_SIZE]
        stays = _chain(_doubles(block, block, threshold, scratch))
        kept.append(alive[:BLOCK_SIZE][stays])
        rows, columns, alive = block[:, stays], columns[:, BLOCK_SIZE:], alive[BLOCK_SIZE:]
        tiles = columns.split(TILE_SIZE, 1) if len(alive) else ()
        gone = [_doubles(rows, tile, threshold, scratch).any(0) for tile in tiles]
        if gone:
            left = (~torch.cat(gone)).nonzero()[:, 0]
            columns, alive = columns[:, left], alive[left]
    return torch.cat(kept)[:max_detections]


def _doubles(rows: Tensor, columns: Tensor, threshold: float, scratch: Tensor) -> Tensor:
    """Return which pairs of rows (5, R) and columns (5, C), coordinates and area, overlap too much: bool (R, C)."""
    r, c = rows.shape[1], columns.shape[1]
    low, high, shared = (part[: r * c].view(r, c) for part in scratch)
    torch.minimum(rows[2][:, None], columns[2], out=high)
    torch.maximum(rows[0][:, None], columns[0], out=low)
    torch.sub(high, low, out=shared).clamp_(min=0)
    torch.minimum(rows[3][:, None], columns[3], out=high)
    torch.maximum(rows[1][:, None], columns[1], out=low)
    shared.mul_(high.sub_(low).clamp_(min=0))
    together = torch.add(rows[4][:, None], columns[4], out=low).sub_(shared)
    double: Tensor = shared.div_(together) > threshold  # never for 0 / 0, boxes without area
    return double


def _chain(double: Tensor) -> Tensor:
    """Return which boxes (B,) of a block stay, given which pairs (B, B) are doubles; the surest come first.

    A box stays unless one before it stays that it doubles. Starting from all, each round settles at least one more.
    """
    before = double.triu(1).float()
    stays = torch.ones(len(double), device=double.device)
    while True:
        following = ((stays @ before) == 0).float()
        if following.equal(stays):
            return stays.bool()
        stays = following
