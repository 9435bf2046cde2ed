"""The two-stage detector of EECS 498: proposals from nine anchors in each cell of a coarse map, then a class for each.

References: Ren et al., 2015, "Faster R-CNN"; EECS 498, assignment 5. Differences from the paper, as in the course: the
second stage refines no box and has no background class; a detection's score is the first stage's objectness alone.
Differences from the course: negatives are sampled without replacement, and the loss of an image without objects is
finite.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.experiments.detection.models.base import Targets, TwoStageHead
from cvlab.experiments.detection.models.faster_rcnn import decode, encode
from cvlab.ops import anchors, boxes, nms
from cvlab.ops.average_precision import Detections
from cvlab.ops.roi_align import roi_align

NUM_ANCHORS = len(anchors.COURSE_SHAPES)
POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
BOX_LOSS_WEIGHT = 5.0
ROI_SIZE = 2  # cells of a pooled region along a side
PROPOSAL_NMS_IOU, POST_NMS_TOP_K = 0.7, 100


class RpnOutputs(NamedTuple):
    """Predictions of the region proposal network for N images with P = A * h * w anchors, flat in the order (A, h, w).

    features: (N, D, h, w), the input. objectness_logits: (N, P, 2), before the sigmoid: object, background.
    deltas: (N, P, 4), center shift in anchor sides, logarithms of the side ratios.
    """

    features: Tensor
    objectness_logits: Tensor
    deltas: Tensor


class PositiveAnchors(NamedTuple):
    """The K positive anchors of a batch.

    image, anchor, labels: int64 (K,). boxes_xyxy: their ground-truth boxes (K, 4), in cells.
    """

    image: Tensor
    anchor: Tensor
    labels: Tensor
    boxes_xyxy: Tensor


class FasterRcnnCourse(TwoStageHead[RpnOutputs]):
    """Both stages on the last map of a backbone, 7 x 7 cells for images of 224 pixels."""

    strides = (32,)
    uses_last_layer = True
    shapes: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: PositiveInt = 256,
        hidden: PositiveInt = 256,
        dropout: FractionBelowOne = 0.3,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.rpn_conv = nn.Sequential(nn.Conv2d(channels[-1], width, 3, padding=1), nn.Dropout(dropout), nn.LeakyReLU())
        self.rpn_predictor = nn.Conv2d(width, 6 * NUM_ANCHORS, 1)
        self.cls_score = nn.Sequential(
            nn.Linear(channels[-1], hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, num_classes)
        )
        self.register_buffer("shapes", torch.tensor(anchors.COURSE_SHAPES).float(), persistent=False)

    def forward(self, features: Sequence[Tensor]) -> RpnOutputs:
        """Run the first stage on the last map (N, D, h, w). Its channels: A x 2 logits, A x 4 deltas."""
        raw = self.rpn_predictor(self.rpn_conv(features[-1])).float()  # (N, 6A, h, w)
        logits, deltas = raw.split([2 * NUM_ANCHORS, 4 * NUM_ANCHORS], 1)
        return RpnOutputs(features[-1], _flatten_anchors(logits), _flatten_anchors(deltas))

    def anchors(self, outputs: RpnOutputs) -> Tensor:
        """Return the anchors_xyxy (P, 4), in cells."""
        centers = anchors.grid_centers(*outputs.features.shape[2:]).to(self.shapes)
        return anchors.generate_anchors(centers, self.shapes).flatten(0, 2)

    def losses(self, outputs: RpnOutputs, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss` and its parts, sums over an image's anchors and means over images.

        `rpn_loss` is the first stage's: `rpn_class_loss` plus five times `rpn_box_loss`.
        """
        positives, is_negative = self.match_anchors(outputs, targets)
        image, anchor = positives.image, positives.anchor
        num_positives, num_images = len(image), len(outputs.objectness_logits)
        negative = outputs.objectness_logits[is_negative]
        negative = negative[torch.randperm(len(negative))[:num_positives].to(negative.device)]
        logits = torch.cat([outputs.objectness_logits[image, anchor], negative])
        is_object = torch.zeros_like(logits)
        is_object[:num_positives, 0] = 1
        is_object[num_positives:, 1] = 1
        rpn_class_loss = F.binary_cross_entropy_with_logits(logits, is_object, reduction="sum") / num_images
        anchors_xyxy = self.anchors(outputs)[anchor]
        deltas = outputs.deltas[image, anchor]
        target_deltas = encode(positives.boxes_xyxy, anchors_xyxy)
        rpn_box_loss = F.smooth_l1_loss(deltas, target_deltas, reduction="sum") / num_images
        proposals = self.clip(decode(deltas.detach(), anchors_xyxy), outputs)
        class_logits = self.box_head(outputs, proposals, image)
        class_loss = F.cross_entropy(class_logits, positives.labels, reduction="sum") / num_images
        rpn_loss = rpn_class_loss + BOX_LOSS_WEIGHT * rpn_box_loss
        parts = {"rpn_class_loss": rpn_class_loss, "rpn_box_loss": rpn_box_loss, "class_loss": class_loss}
        return {"loss": rpn_loss + class_loss, "rpn_loss": rpn_loss, **parts}

    @torch.no_grad()
    def match_anchors(self, outputs: RpnOutputs, targets: Targets) -> tuple[PositiveAnchors, Tensor]:
        """Return the positive anchors, and which anchors, bool (N, P), are negative."""
        anchors_xyxy = self.anchors(outputs)
        shape = outputs.objectness_logits.shape[:2]
        is_negative = torch.zeros(shape, dtype=torch.bool, device=anchors_xyxy.device)
        positives = []
        for k, (gt_boxes, gt_labels, _) in enumerate(targets.unpad()):
            gt_boxes = gt_boxes.to(anchors_xyxy) / self.strides[0]
            labels, matched_box = anchors.match_by_iou(boxes.iou(anchors_xyxy, gt_boxes), POSITIVE_IOU, NEGATIVE_IOU)
            is_negative[k] = labels == 0
            anchor = (labels == 1).nonzero()[:, 0]
            box = matched_box[anchor]
            positives.append(PositiveAnchors(torch.full_like(anchor, k), anchor, gt_labels[box], gt_boxes[box]))
        return PositiveAnchors(*(torch.cat(parts) for parts in zip(*positives, strict=True))), is_negative

    def clip(self, boxes_xyxy: Tensor, outputs: RpnOutputs) -> Tensor:
        """Return boxes (K, 4), in cells, clipped to the feature map."""
        return boxes.clip(boxes_xyxy, outputs.features.shape[3], outputs.features.shape[2])

    def box_head(self, outputs: RpnOutputs, proposals_xyxy: Tensor, image: Tensor) -> Tensor:
        """Return class logits (K, C) of proposals (K, 4), in cells, in the images `image`, int64 (K,)."""
        pooled = roi_align(outputs.features, proposals_xyxy, image, ROI_SIZE)  # (K, D, 2, 2)
        logits: Tensor = self.cls_score(pooled.mean((2, 3)).to(self.shapes)).float()
        return logits

    @torch.no_grad()
    def generate_proposals(self, outputs: RpnOutputs, score_threshold: float = 0.5) -> list[tuple[Tensor, Tensor]]:
        """Return each image's proposals (K, 4), in pixels, with an objectness of at least `score_threshold`.

        Before NMS they are in the order of the anchors, after it highest objectness first.
        """
        proposals = self._scored_proposals(outputs, score_threshold)
        return [(before * self.strides[0], after * self.strides[0]) for before, after, _ in proposals]

    def _scored_proposals(self, outputs: RpnOutputs, score_threshold: float) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each image's proposals in cells, before and after NMS, and the objectness of the latter."""
        anchors_xyxy = self.anchors(outputs)
        proposals = []
        for objectness, deltas in zip(outputs.objectness_logits[..., 0].sigmoid(), outputs.deltas, strict=True):
            above = objectness >= score_threshold
            box, score = self.clip(decode(deltas[above], anchors_xyxy[above]), outputs), objectness[above]
            keep = nms.nms(box, score, PROPOSAL_NMS_IOU, POST_NMS_TOP_K)
            proposals.append((box, box[keep], score[keep]))
        return proposals

    def postprocess(
        self, outputs: RpnOutputs, size_px: int, score_threshold: float, nms_iou: float, max_detections: int
    ) -> list[Detections]:
        """Return each image's detections; see `DetectionHead.postprocess`."""
        results = []
        for k, (_, proposals, score) in enumerate(self._scored_proposals(outputs, score_threshold)):
            image = torch.full((len(proposals),), k, dtype=torch.int64, device=proposals.device)
            label = self.box_head(outputs, proposals, image).argmax(1)
            box = proposals * self.strides[0]
            keep = nms.batched_nms(box, score, label, nms_iou, max_detections)
            results.append(Detections(box[keep], score[keep], label[keep]))
        return results


def _flatten_anchors(raw: Tensor) -> Tensor:
    """Return (N, A * D, h, w) as (N, P, D), anchors in the order (A, h, w)."""
    flat: Tensor = raw.unflatten(1, (NUM_ANCHORS, -1)).movedim(2, -1).flatten(1, 3)
    return flat
