"""The interface of a detection head, and the ground-truth boxes that it is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from cvlab.engine.device import upload
from cvlab.ops.average_precision import Detections

Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class Targets:
    """The ground truth of N images, padded to M boxes each.

    boxes_xyxy: (N, M, 4), in pixels. labels: int64 (N, M), -1 for padding. confidence: (N, M), in [0, 1]; 1 for boxes
    drawn by people, the teacher's confidence for pseudo-labels. ignored: bool (N, M), boxes that are neither to be
    detected nor background: difficult ones, crowds, and what only a teacher detects.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    confidence: Tensor
    ignored: Tensor

    def to(self, device: torch.device) -> "Targets":
        """Return a copy on a device."""
        return Targets(
            *(upload(getattr(self, name), device) for name in ("boxes_xyxy", "labels", "confidence", "ignored"))
        )

    def chunk(self, count: int) -> "list[Targets]":
        """Return the targets of `count` equal parts of the images; all stay padded to M boxes."""
        fields = (self.boxes_xyxy, self.labels, self.confidence, self.ignored)
        return [Targets(*part) for part in zip(*(field.chunk(count) for field in fields), strict=True)]

    def counted_labels(self) -> Tensor:
        """Return the labels (N, M), -1 for padding and for ignored boxes."""
        return self.labels.masked_fill(self.ignored, -1)

    def unpad(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the boxes (K, 4), labels (K,) and confidences (K,) of each image, without padding and ignored ones."""
        images = zip(self.boxes_xyxy, self.counted_labels(), self.confidence, strict=True)
        return [(boxes[labels >= 0], labels[labels >= 0], conf[labels >= 0]) for boxes, labels, conf in images]

    def __len__(self) -> int:
        return len(self.labels)


def collate_targets(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    confidence: Sequence[Tensor] | None = None,
    ignored: Sequence[Tensor] | None = None,
) -> Targets:
    """Pad the boxes (K_i, 4), labels, confidences and ignored flags (K_i,) of several images to a length of at least 1.

    Without confidences all are 1; without flags no box is ignored.
    """
    max_boxes = max(1, *(len(image_labels) for image_labels in labels), 0) if labels else 1
    padded_boxes = torch.zeros(len(labels), max_boxes, 4)
    padded_labels = torch.full((len(labels), max_boxes), -1, dtype=torch.int64)
    for k, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        padded_boxes[k, : len(image_labels)] = image_boxes
        padded_labels[k, : len(image_labels)] = image_labels
    padded_confidence = torch.ones(len(labels), max_boxes)
    for k, image_confidence in enumerate(confidence or ()):
        padded_confidence[k, : len(image_confidence)] = image_confidence
    padded_ignored = torch.zeros(len(labels), max_boxes, dtype=torch.bool)
    for k, image_ignored in enumerate(ignored or ()):
        padded_ignored[k, : len(image_ignored)] = image_ignored
    return Targets(padded_boxes, padded_labels, padded_confidence, padded_ignored)


class DetectionHead(nn.Module, Generic[Outputs]):
    """A detector on top of a backbone: `forward(features)` returns raw `Outputs`, of which losses or boxes are made.

    `features` are the backbone's feature maps (N, C_k, S / stride_k, S / stride_k) at `strides`, highest resolution
    first. A head is built with the keyword arguments `channels` (the C_k) and `num_classes`; its other arguments are
    the keys of the configuration's `model` block.
    """

    strides: ClassVar[tuple[int, ...]]
    uses_last_layer: ClassVar[bool] = False  # stride 32 from the backbone's last, widest layer
    output_names: ClassVar[tuple[str, ...]] = ()  # of `export_outputs`; empty: cannot be exported as a graph

    def load_pretrained(self, classes: Sequence[str]) -> None:
        """Load the weights that this head has for its backbone and for some of `classes`, if it has any."""

    def losses(self, outputs: Outputs, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss`, which is minimized, and its parts, for square images of `size_px` pixels."""
        raise NotImplementedError

    def postprocess(
        self, outputs: Outputs, size_px: int, score_threshold: float, nms_iou: float, max_detections: int
    ) -> list[Detections]:
        """Return each image's detections, in pixels, highest score first.

        Detections below `score_threshold` are dropped, and of those of one class that overlap by more than `nms_iou`
        all but the highest-scoring; at most `max_detections` are returned.
        """
        raise NotImplementedError

    def export_outputs(self, outputs: Outputs) -> tuple[Tensor, ...]:
        """Return the outputs as plain tensors, named by `output_names`."""
        raise NotImplementedError


class TwoStageHead(DetectionHead[Outputs]):
    """A head whose first stage, a region proposal network, proposes boxes that the second stage classifies."""

    def generate_proposals(self, outputs: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return each image's proposals (K, 4), in pixels, before and after non-maximum suppression."""
        raise NotImplementedError
