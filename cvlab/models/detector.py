"""What all detectors take and give: padded boxes of a batch of pictures, and what is found in one picture.

A detector is a module on the maps of a backbone with three methods: `forward(maps)`, `losses(found, targets, size_px)`
with `loss` among them, and `detections(found, size_px, floor, iou, most)`, best first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The boxes of N pictures, padded to M: boxes_xyxy (N, M, 4) in pixels, labels (N, M), -1: none."""

    boxes_xyxy: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def padded(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
    """Put boxes (K_i, 4) and labels (K_i,) of several pictures together; at least one place for each."""
    most = max(1, *(len(part) for part in labels), 0) if labels else 1
    made = torch.zeros(len(labels), most, 4)
    marks = torch.full((len(labels), most), -1, dtype=torch.int64)
    for k, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        made[k, : len(label)] = box
        marks[k, : len(label)] = label
    return Targets(made, marks)
