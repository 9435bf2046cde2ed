"""What all detectors take and give: padded boxes of a batch of pictures, and what is found in one picture.

A detector is a module on the maps of a backbone with three methods: `forward(maps)`, `losses(found, targets, size_px)`
with `loss` among them, and `detections(found, size_px, floor, iou, most)`, best first. One of two stages also has
`regions_of(found)`, what its first stage proposes. `strides` are those of the maps it reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The boxes of N pictures, padded to M: boxes_xyxy (N, M, 4) in pixels, labels (N, M), -1: none.

    `confidence` (N, M) in [0, 1] is how sure whoever drew a box was of it; a person is always sure.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    confidence: Tensor

    def to(self, device: torch.device) -> "Targets":
        """Return the same on a device."""
        return Targets(self.boxes_xyxy.to(device), self.labels.to(device), self.confidence.to(device))

    def __len__(self) -> int:
        return len(self.labels)


def padded(boxes: Sequence[Tensor], labels: Sequence[Tensor], confidence: Sequence[Tensor] | None = None) -> Targets:
    """Put boxes (K_i, 4), labels (K_i,) and confidences (K_i,) of several pictures together, at least one place each.

    Without confidences all are 1.
    """
    most = max(1, *(len(part) for part in labels), 0) if labels else 1
    made = torch.zeros(len(labels), most, 4)
    marks = torch.full((len(labels), most), -1, dtype=torch.int64)
    for k, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        made[k, : len(label)] = box
        marks[k, : len(label)] = label
    sure = torch.ones(len(labels), most)
    for k, some in enumerate(confidence or ()):
        sure[k, : len(some)] = some
    return Targets(made, marks, sure)
