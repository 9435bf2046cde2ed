"""What one-stage detectors share that predict class scores and a box at every cell of several feature maps.

References: Tian et al., 2019, "FCOS" (a box is four distances from a point); Feng et al., 2021, "TOOD" (task-aligned
assignment of points to boxes, and the score that a point is trained towards); Li et al., 2020, "Generalized focal loss"
(a distance is the mean of a distribution over whole strides).
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.experiments.detection.models.base import DetectionHead, Targets
from cvlab.ops import assignment, boxes, nms
from cvlab.ops.average_precision import Detections

PRE_NMS_TOP_K = 1000
BOX_LOSS_WEIGHT = 2.5  # as in PP-YOLOE; the weight of the classification loss is 1
DISTRIBUTION_LOSS_WEIGHT = 0.5  # as in PP-YOLOE
MAX_BIN_GAP = 0.01  # a distance is kept this far from the last bin, which has no right neighbor


class DenseOutputs(NamedTuple):
    """Predictions at the P points of all levels.

    class_logits: (N, P, C), before the sigmoid. boxes_xyxy: (N, P, 4), in pixels. points: (P, 3), x, y and stride.
    distance_logits: (N, P, 4, B), before the softmax over B bins of one stride each, of a head that predicts the
    distances to the four edges as distributions; else None.
    """

    class_logits: Tensor
    boxes_xyxy: Tensor
    points: Tensor
    distance_logits: Tensor | None = None


class DenseHead(DetectionHead[DenseOutputs]):
    """A head whose outputs are `DenseOutputs`: their losses, and the boxes that are made of them.

    The classification loss is the binary cross-entropy, times the error to the power `focal_power` (the quality focal
    loss of "Generalized focal loss", equation 5).
    """

    focal_power: ClassVar[float] = 0.0

    strides = (8, 16, 32)
    output_names = ("scores", "boxes_xyxy")

    def export_outputs(self, outputs: DenseOutputs) -> tuple[Tensor, Tensor]:
        """Return scores (N, P, C) in [0, 1] and boxes_xyxy (N, P, 4)."""
        return outputs.class_logits.sigmoid(), outputs.boxes_xyxy

    def losses(self, outputs: DenseOutputs, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss` and its parts, means over the positive points weighted by their quality.

        The target score of a positive point is its alignment with its box times the box's confidence (Hinton et al.,
        2015, "Distilling the knowledge in a neural network": a teacher's soft labels carry information). Inside of
        ignored boxes, points that are not positive have no classification loss for the class of the box.
        """
        logits, boxes_xyxy, points, distance_logits = outputs
        with torch.no_grad():
            assigned = assignment.assign_task_aligned(
                logits.sigmoid(), boxes_xyxy, points, targets.boxes_xyxy, targets.counted_labels()
            )
        image, point = assigned.image, assigned.point
        quality = assigned.quality * targets.confidence[image, assigned.box]
        normalizer = quality.sum().clamp(min=1.0)
        target_scores = torch.zeros_like(logits)
        target_scores[image, point, targets.labels[image, assigned.box]] = quality
        class_losses = F.binary_cross_entropy_with_logits(logits, target_scores, reduction="none")
        if self.focal_power:
            class_losses = class_losses * (target_scores - logits.sigmoid()).abs().pow(self.focal_power)
        if bool(targets.ignored.any()):
            class_losses = class_losses.masked_fill(_ignored(points, targets, logits.shape) & (target_scores == 0), 0)
        class_loss = class_losses.sum() / normalizer
        gt_boxes = targets.boxes_xyxy[image, assigned.box]
        giou = boxes.paired_giou(boxes_xyxy[image, point], gt_boxes)
        box_loss = BOX_LOSS_WEIGHT * ((1 - giou) * quality).sum() / normalizer
        parts = {"class_loss": class_loss, "box_loss": box_loss}
        if distance_logits is not None:
            distances = distances_in_strides(points[point], gt_boxes)
            by_edge = distribution_loss(distance_logits[image, point], distances)
            parts["distribution_loss"] = DISTRIBUTION_LOSS_WEIGHT * (by_edge.mean(1) * quality).sum() / normalizer
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def postprocess(
        self, outputs: DenseOutputs, size_px: int, score_threshold: float, nms_iou: float, max_detections: int
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


def _ignored(points: Tensor, targets: Targets, shape: torch.Size) -> Tensor:
    """Return which class at which point an ignored box covers, bool (N, P, C)."""
    mask = torch.zeros(shape, dtype=torch.bool, device=points.device)
    image, box = targets.ignored.nonzero(as_tuple=True)
    left, top, right, bottom = targets.boxes_xyxy[image, box, :, None].unbind(1)  # (K, 1)
    x, y = points[:, 0], points[:, 1]
    row, point = ((x > left) & (x < right) & (y > top) & (y < bottom)).nonzero(as_tuple=True)
    mask[image[row], point, targets.labels[image, box][row]] = True
    return mask


def decode(points: Tensor, ltrb_px: Tensor) -> Tensor:
    """Return boxes_xyxy (N, P, 4) of distances (N, P, 4), left, top, right and bottom, from points (P, 3)."""
    centers = points[:, :2]
    return torch.cat([centers - ltrb_px[..., :2], centers + ltrb_px[..., 2:]], 2)


def distances_in_strides(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Return the distances (K, 4) from points (K, 3) to the left, top, right and bottom edge of a box each."""
    centers, stride = points[:, :2], points[:, 2:]
    return torch.cat([centers - boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - centers], 1) / stride


def distribution_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Return the distribution focal loss (K, 4) of logits (K, 4, B) for distances (K, 4) in strides, equation 6.

    A distance between two bins is the target of both, by how near it is.
    """
    num_bins = logits.shape[-1]
    clamped = distances.clamp(0, num_bins - 1 - MAX_BIN_GAP)
    lower = clamped.long()
    upper_weight = clamped - lower
    log_probs = logits.log_softmax(-1)
    at_lower = log_probs.gather(-1, lower[..., None])[..., 0]
    at_upper = log_probs.gather(-1, lower[..., None] + 1)[..., 0]
    return -(at_lower * (1 - upper_weight) + at_upper * upper_weight)
