"""The one-stage detector of EECS 498: nine anchors in each cell of a coarse map, one of them positive for an object.

References: Redmon et al., 2016, "You only look once"; anchors as in Redmon and Farhadi, 2017, "YOLO9000"; EECS 498,
assignment 5. Differences from the course: negatives are sampled without replacement, and the loss of an image without
objects is finite. `faithful: false` follows the paper instead: the confidence is trained towards the IoU of the
predicted box, not 1, and a detection's score is confidence times class probability, not the confidence alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.experiments.detection.models.base import DetectionHead, Targets
from cvlab.ops import anchors, boxes, nms
from cvlab.ops.average_precision import Detections

NUM_ANCHORS = len(anchors.COURSE_SHAPES)
NEGATIVE_IOU = 0.2
MAX_LOG_SCALE = 5.0  # e^5 anchors: larger than any image, and far from overflow
MIN_SIDE_CELLS = 1e-3  # of a ground-truth box, so that its logarithm is finite


class YoloGridOutputs(NamedTuple):
    """Predictions for N images with P = A * h * w anchors, flat in the order (A, h, w).

    confidence: (N, P), in [0, 1]. offsets: (N, P, 4), tx and ty in (-0.5, 0.5) cells, tw and th logarithms of scales.
    class_logits: (N, C, h, w), before the softmax, shared by all anchors of a cell.
    """

    confidence: Tensor
    offsets: Tensor
    class_logits: Tensor


class PositiveAnchors(NamedTuple):
    """The K objects of a batch, each with its positive anchor.

    image, anchor, labels: int64 (K,). boxes_xyxy: the ground-truth boxes (K, 4), in cells.
    """

    image: Tensor
    anchor: Tensor
    boxes_xyxy: Tensor
    labels: Tensor


class YoloGrid(DetectionHead[YoloGridOutputs]):
    """Confidences, offsets and classes on the last map of a backbone, 7 x 7 cells for images of 224 pixels."""

    strides = (32,)
    uses_last_layer = True
    shapes: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: PositiveInt = 128,
        dropout: FractionBelowOne = 0.3,
        faithful: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.faithful = num_classes, faithful
        self.head = nn.Sequential(
            nn.Conv2d(channels[-1], width, 1),
            nn.Dropout(dropout),
            nn.LeakyReLU(),
            nn.Conv2d(width, 5 * NUM_ANCHORS + num_classes, 1),
        )
        self.register_buffer("shapes", torch.tensor(anchors.COURSE_SHAPES).float(), persistent=False)

    def forward(self, features: Sequence[Tensor]) -> YoloGridOutputs:
        """Predict from the last map (N, D, h, w). The head's channels: A confidences, A x 4 offsets, C classes."""
        raw = self.head(features[-1]).float()  # (N, 5A + C, h, w)
        confidence, offsets, logits = raw.split([NUM_ANCHORS, 4 * NUM_ANCHORS, self.num_classes], 1)
        offsets = offsets.unflatten(1, (NUM_ANCHORS, 4)).movedim(2, -1).flatten(1, 3)  # (N, P, 4)
        offsets = torch.cat([offsets[..., :2].sigmoid() - 0.5, offsets[..., 2:]], -1)
        return YoloGridOutputs(confidence.sigmoid().flatten(1), offsets, logits)

    def anchors(self, outputs: YoloGridOutputs) -> Tensor:
        """Return the anchors_cxcywh (P, 4), in cells."""
        anchors_xyxy = anchors.generate_anchors(self._centers(outputs), self.shapes)
        return boxes.xyxy_to_cxcywh(anchors_xyxy.flatten(0, 2))

    def _centers(self, outputs: YoloGridOutputs) -> Tensor:
        """Return the centers of the cells (h, w, 2), in cells."""
        height, width = outputs.class_logits.shape[2:]
        return anchors.grid_centers(height, width).to(self.shapes)

    def losses(self, outputs: YoloGridOutputs, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss`, the sum of its three parts; all are 0 if no image has an object."""
        positives, is_negative = self.match_anchors(outputs, targets)
        anchors_cxcywh = self.anchors(outputs)[positives.anchor]  # (K, 4)
        offsets = outputs.offsets[positives.image, positives.anchor]  # (K, 4)
        target_confidence = torch.ones_like(offsets[:, 0])
        if not self.faithful:
            decoded = boxes.cxcywh_to_xyxy(decode(offsets.detach(), anchors_cxcywh))
            target_confidence = boxes.paired_iou(decoded, positives.boxes_xyxy)
        num_positives = len(target_confidence)
        positive = outputs.confidence[positives.image, positives.anchor]
        sampled = sample_indices(int(is_negative.sum()), num_positives).to(positive.device)
        negative = outputs.confidence[is_negative][sampled]
        squared_errors = (positive - target_confidence).square().sum() + negative.square().sum()
        confidence_loss = squared_errors / max(1, num_positives + len(negative))
        target_offsets = encode(positives.boxes_xyxy, anchors_cxcywh)
        offset_loss = (offsets - target_offsets).square().sum() / max(1, num_positives)
        class_loss = self._class_loss(outputs.class_logits, positives)
        parts = {"confidence_loss": confidence_loss, "offset_loss": offset_loss, "class_loss": class_loss}
        return {"loss": confidence_loss + offset_loss + class_loss, **parts}

    @torch.no_grad()
    def match_anchors(self, outputs: YoloGridOutputs, targets: Targets) -> tuple[PositiveAnchors, Tensor]:
        """Return the positive anchor of each object, and which anchors, bool (N, P), are negative."""
        centers = self._centers(outputs)
        gt_boxes = targets.boxes_xyxy.to(centers) / self.strides[0]  # (N, M, 4), in cells
        matched, _ = anchors.match_anchors_to_boxes(gt_boxes.flatten(0, 1), centers, self.shapes)
        image, box = (targets.counted_labels() >= 0).nonzero(as_tuple=True)
        anchor = matched.view_as(targets.labels)[image, box]
        positives = PositiveAnchors(image, anchor, gt_boxes[image, box], targets.labels[image, box])
        all_anchors = anchors.generate_anchors(centers, self.shapes).flatten(0, 2)[None, :, None]  # (1, P, 1, 4)
        iou = boxes.paired_iou(all_anchors, gt_boxes[:, None])  # (N, P, M), 0 with padding
        is_negative = anchors.negative_mask(iou, NEGATIVE_IOU)
        is_negative[positives.image, positives.anchor] = False  # a thin box may overlap its positive anchor by less
        return positives, is_negative

    def _class_loss(self, class_logits: Tensor, positives: PositiveAnchors) -> Tensor:
        """Return the cross-entropy: the mean over images with objects of each one's mean over its objects."""
        cells = class_logits.flatten(2).mT  # (N, h * w, C)
        logits = cells[positives.image, positives.anchor % cells.shape[1]]  # (K, C)
        num_objects = torch.bincount(positives.image, minlength=len(class_logits))  # (N,)
        weight = 1 / num_objects[positives.image]
        cross_entropy = F.cross_entropy(logits, positives.labels, reduction="none")
        return (cross_entropy * weight).sum() / (num_objects > 0).sum().clamp(min=1)

    def postprocess(
        self, outputs: YoloGridOutputs, size_px: int, score_threshold: float, nms_iou: float, max_detections: int
    ) -> list[Detections]:
        """Return each image's detections; see `DetectionHead.postprocess`."""
        decoded = boxes.cxcywh_to_xyxy(decode(outputs.offsets, self.anchors(outputs))) * self.strides[0]  # (N, P, 4)
        probability, label = outputs.class_logits.softmax(1).flatten(2).max(1)  # (N, h * w)
        labels = label.repeat(1, NUM_ANCHORS)  # (N, P)
        scores = outputs.confidence
        if not self.faithful:
            scores = scores * probability.repeat(1, NUM_ANCHORS)
        results = []
        for image_scores, image_boxes, image_labels in zip(scores, decoded, labels, strict=True):
            above = image_scores >= score_threshold
            box = boxes.clip(image_boxes[above], size_px, size_px)
            score, label = image_scores[above], image_labels[above]
            keep = nms.batched_nms(box, score, label, nms_iou, max_detections)
            results.append(Detections(box[keep], score[keep], label[keep]))
        return results


def sample_indices(count: int, max_samples: int) -> Tensor:
    """Sample at most `max_samples` of range(count) without replacement, from torch's global generator."""
    return torch.randperm(count)[:max_samples]


def decode(offsets: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the boxes_cxcywh (..., 4) that offsets (..., 4) turn anchors (..., 4) into."""
    center = anchors_cxcywh[..., :2] + offsets[..., :2]
    return torch.cat([center, anchors_cxcywh[..., 2:] * offsets[..., 2:].clamp(max=MAX_LOG_SCALE).exp()], -1)


def encode(boxes_xyxy: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the offsets (K, 4) that turn anchors (K, 4) into boxes (K, 4); all in cells."""
    boxes_cxcywh = boxes.xyxy_to_cxcywh(boxes_xyxy)
    scale = boxes_cxcywh[:, 2:].clamp(min=MIN_SIDE_CELLS) / anchors_cxcywh[:, 2:]
    return torch.cat([boxes_cxcywh[:, :2] - anchors_cxcywh[:, :2], scale.log()], -1)
