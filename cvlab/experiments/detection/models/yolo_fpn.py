"""A one-stage, anchor-free detector: a feature pyramid over three levels and one head that they share.

References: Tian et al., 2019, "FCOS" (a box is four distances from a point); Feng et al., 2021, "TOOD" (task-aligned
assignment of points to boxes, and the score that a point is trained towards). The pyramid is that of fpn.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.experiments.detection.models.base import DetectionHead, Targets
from cvlab.experiments.detection.models.fpn import FeaturePyramid, Tower
from cvlab.ops import assignment, boxes, nms
from cvlab.ops.average_precision import Detections

PRIOR_PROBABILITY = 1e-3  # of every class at every point at the start: few of thousands of points are positive
PRE_NMS_TOP_K = 1000
BOX_LOSS_WEIGHT = 2.5  # as in PP-YOLOE; the weight of the classification loss is 1


class YoloFpnOutputs(NamedTuple):
    """Predictions at the P points of all levels.

    class_logits: (N, P, C), before the sigmoid. boxes_xyxy: (N, P, 4), in pixels. points: (P, 3), x, y and stride.
    """

    class_logits: Tensor
    boxes_xyxy: Tensor
    points: Tensor


class YoloFpn(DetectionHead[YoloFpnOutputs]):
    """Class logits and a box at every cell of three feature maps."""

    strides = (8, 16, 32)
    output_names = ("scores", "boxes_xyxy")

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: PositiveInt = 96, depth: PositiveInt = 2
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fpn = FeaturePyramid(channels, width)
        self.class_tower = Tower(width, num_classes, len(channels), depth)
        self.box_tower = Tower(width, 4, len(channels), depth)
        self.scales = nn.Parameter(torch.ones(len(channels)))
        bias = self.class_tower.predictor.bias
        assert bias is not None
        nn.init.constant_(bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def forward(self, features: Sequence[Tensor]) -> YoloFpnOutputs:
        """Predict from feature maps (N, C_k, S / stride_k, S / stride_k), highest resolution first."""
        maps = self.fpn(features)
        points = assignment.grid_points([m.shape[2:] for m in maps], self.strides).to(features[0].device)
        logits = torch.cat([m.flatten(2) for m in self.class_tower(maps)], 2).mT.float()  # (N, P, C)
        distances = [
            F.softplus(m.flatten(2).float() * scale) for m, scale in zip(self.box_tower(maps), self.scales, strict=True)
        ]
        ltrb = torch.cat(distances, 2).mT * points[:, 2:]  # (N, P, 4): left, top, right, bottom
        centers = points[:, :2]
        return YoloFpnOutputs(logits, torch.cat([centers - ltrb[..., :2], centers + ltrb[..., 2:]], 2), points)

    def export_outputs(self, outputs: YoloFpnOutputs) -> tuple[Tensor, Tensor]:
        """Return scores (N, P, C) in [0, 1] and boxes_xyxy (N, P, 4)."""
        return outputs.class_logits.sigmoid(), outputs.boxes_xyxy

    def losses(self, outputs: YoloFpnOutputs, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss` and its parts, means over the positive points weighted by their quality.

        The target score of a positive point is its alignment with its box times the box's confidence (Hinton et al.,
        2015, "Distilling the knowledge in a neural network": a teacher's soft labels carry information).
        """
        logits, boxes_xyxy, points = outputs
        with torch.no_grad():
            assigned = assignment.assign_task_aligned(
                logits.sigmoid(), boxes_xyxy, points, targets.boxes_xyxy, targets.labels
            )
        image, point = assigned.image, assigned.point
        quality = assigned.quality * targets.confidence[image, assigned.box]
        normalizer = quality.sum().clamp(min=1.0)
        target_scores = torch.zeros_like(logits)
        target_scores[image, point, targets.labels[image, assigned.box]] = quality
        class_loss = F.binary_cross_entropy_with_logits(logits, target_scores, reduction="sum") / normalizer
        giou = boxes.paired_giou(boxes_xyxy[image, point], targets.boxes_xyxy[image, assigned.box])
        box_loss = BOX_LOSS_WEIGHT * ((1 - giou) * quality).sum() / normalizer
        return {"loss": class_loss + box_loss, "class_loss": class_loss, "box_loss": box_loss}

    def postprocess(
        self, outputs: YoloFpnOutputs, size_px: int, score_threshold: float, nms_iou: float, max_detections: int
    ) -> list[Detections]:
        """Return each image's detections; see `DetectionHead.postprocess`."""
        results = []
        for scores, boxes_xyxy in zip(outputs.class_logits.sigmoid(), outputs.boxes_xyxy, strict=True):
            point, label = (scores >= score_threshold).nonzero(as_tuple=True)
            score, box = scores[point, label], boxes_xyxy[point]
            if len(score) > PRE_NMS_TOP_K:
                score, best = score.topk(PRE_NMS_TOP_K)
                box, label = box[best], label[best]
            box = boxes.clip(box, size_px, size_px)
            keep = nms.batched_nms(box, score, label, nms_iou, max_detections)
            results.append(Detections(box[keep], score[keep], label[keep]))
        return results
