"""The one-stage detector of a course: nine anchors in each cell of a coarse map, one of which answers for an object.

Paper: Redmon et al., 2016, "You only look once"; anchors as in Redmon and Farhadi, 2017, "YOLO9000". Source: EECS 498,
assignment 5. Differs from the course: negatives are drawn without replacement, and a picture without objects has a
finite loss. `faithful: false` does what the paper does: the confidence is to be the IoU of the box that is found, not
1, and a detection's score is confidence times probability of its class, not the confidence alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.experiments.detection.models.base import Targets
from cvlab.ops import anchors, boxes, nms
from cvlab.ops.average_precision import Detections

NUM_ANCHORS = len(anchors.COURSE_SHAPES)
NEGATIVE_IOU = 0.2
MOST_GROWTH = 5.0  # e^5 anchors: more than any picture has, and far from overflow
LEAST_CELLS = 1e-3  # a side of a box to be found; its logarithm is finite


class Found(NamedTuple):
    """What the head says of N pictures with P = A * h * w anchors, flat in the order (A, h, w).

    `confidence` (N, P) in [0, 1]; `offsets` (N, P, 4): tx and ty in (-0.5, 0.5) cells, tw and th logarithms of factors;
    `scores` (N, C, h, w) before the softmax, shared by all anchors of a cell.
    """

    confidence: Tensor
    offsets: Tensor
    scores: Tensor


class Positives(NamedTuple):
    """The objects of a batch, K in all: picture (K,), the anchor that answers (K,), box in cells (K, 4), label (K,)."""

    image: Tensor
    anchor: Tensor
    boxes_xyxy: Tensor
    labels: Tensor


class YoloGrid(nn.Module):
    """Confidences, offsets and classes on the last map of a backbone, 7 x 7 cells for pictures of 224 pixels."""

    strides = (32,)
    is_last = True
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

    def forward(self, maps: Sequence[Tensor]) -> Found:
        """Look at the last map (N, D, h, w). The head's channels: A confidences, A times four offsets, C classes."""
        raw = self.head(maps[-1]).float()  # (N, 5A + C, h, w)
        confidence, offsets, scores = raw.split([NUM_ANCHORS, 4 * NUM_ANCHORS, self.num_classes], 1)
        offsets = offsets.unflatten(1, (NUM_ANCHORS, 4)).movedim(2, -1).flatten(1, 3)  # (N, P, 4)
        offsets = torch.cat([offsets[..., :2].sigmoid() - 0.5, offsets[..., 2:]], -1)
        return Found(confidence.sigmoid().flatten(1), offsets, scores)

    def anchors(self, found: Found) -> Tensor:
        """Return the anchors (P, 4) in cells: middle x, middle y, width, height."""
        made = anchors.generate_anchors(self._centres(found), self.shapes)
        return boxes.xyxy_to_cxcywh(made.flatten(0, 2))

    def _centres(self, found: Found) -> Tensor:
        height, width = found.scores.shape[2:]
        return anchors.grid_centers(height, width).to(self.shapes)

    def losses(self, found: Found, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss`, the sum of its three parts; all are 0 where no picture has an object."""
        positives, is_negative = self.matched(found, targets)
        own = self.anchors(found)[positives.anchor]  # (K, 4)
        offsets = found.offsets[positives.image, positives.anchor]  # (K, 4)
        wanted = torch.ones_like(offsets[:, 0])
        if not self.faithful:
            decoded = boxes.cxcywh_to_xyxy(decode(offsets.detach(), own))
            wanted = boxes.paired_iou(decoded, positives.boxes_xyxy)
        count = len(wanted)
        sure = found.confidence[positives.image, positives.anchor]
        unsure = found.confidence[is_negative][draw(int(is_negative.sum()), count).to(sure.device)]
        confidence_loss = ((sure - wanted).square().sum() + unsure.square().sum()) / max(1, count + len(unsure))
        offset_loss = (offsets - encode(positives.boxes_xyxy, own)).square().sum() / max(1, count)
        class_loss = self._class_loss(found.scores, positives)
        loss = confidence_loss + offset_loss + class_loss
        return {
            "loss": loss,
            "confidence_loss": confidence_loss,
            "offset_loss": offset_loss,
            "class_loss": class_loss,
        }

    @torch.no_grad()
    def matched(self, found: Found, targets: Targets) -> tuple[Positives, Tensor]:
        """Return what answers for the objects, and which anchors, bool (N, P), are negative."""
        centres = self._centres(found)
        boxes_xyxy = targets.boxes_xyxy.to(centres) / self.strides[0]  # (N, M, 4), in cells
        place, _ = anchors.match_anchors_to_boxes(boxes_xyxy.flatten(0, 1), centres, self.shapes)
        image, box = (targets.labels >= 0).nonzero(as_tuple=True)
        chosen = place.view_as(targets.labels)[image, box]
        positives = Positives(image, chosen, boxes_xyxy[image, box], targets.labels[image, box])
        every = anchors.generate_anchors(centres, self.shapes).flatten(0, 2)[None, :, None]  # (1, P, 1, 4)
        overlap = boxes.paired_iou(every, boxes_xyxy[:, None])  # (N, P, M), 0 with the boxes that only pad
        is_negative = anchors.negative_mask(overlap, NEGATIVE_IOU)
        is_negative[positives.image, positives.anchor] = False  # a thin box may overlap even its own anchor by less
        return positives, is_negative

    def _class_loss(self, scores: Tensor, positives: Positives) -> Tensor:
        """Return the cross-entropy of the objects: the mean of each picture's mean, of pictures that have some."""
        cells = scores.flatten(2).mT  # (N, h * w, C)
        chosen = cells[positives.image, positives.anchor % cells.shape[1]]  # (K, C)
        in_picture = torch.bincount(positives.image, minlength=len(scores))  # (N,)
        weight = 1 / in_picture[positives.image]
        each = F.cross_entropy(chosen, positives.labels, reduction="none")
        return (each * weight).sum() / (in_picture > 0).sum().clamp(min=1)

    def detections(self, found: Found, size_px: int, floor: float, iou: float, most: int) -> list[Detections]:
        """Return what is found in each picture: scores of at least `floor`, without doubles of a class, best first."""
        decoded = boxes.cxcywh_to_xyxy(decode(found.offsets, self.anchors(found))) * self.strides[0]  # (N, P, 4)
        probability, label = found.scores.softmax(1).flatten(2).max(1)  # (N, h * w)
        label = label.repeat(1, NUM_ANCHORS)  # (N, P)
        scores = found.confidence
        if not self.faithful:
            scores = scores * probability.repeat(1, NUM_ANCHORS)
        results = []
        for score, box, name in zip(scores, decoded, label, strict=True):
            sure = score >= floor
            places = boxes.clip(box[sure], size_px, size_px)
            kept = nms.batched_nms(places, score[sure], name[sure], iou, most)
            results.append(Detections(places[kept], score[sure][kept], name[sure][kept]))
        return results


def draw(count: int, wanted: int) -> Tensor:
    """Draw at most `wanted` of `count` places without replacement, with the generator that checkpoints keep."""
    return torch.randperm(count)[:wanted]


def decode(offsets: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the boxes (..., 4), middle x, middle y, width, height, that offsets (..., 4) make of anchors (..., 4)."""
    middle = anchors_cxcywh[..., :2] + offsets[..., :2]
    return torch.cat([middle, anchors_cxcywh[..., 2:] * offsets[..., 2:].clamp(max=MOST_GROWTH).exp()], -1)


def encode(boxes_xyxy: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the offsets (K, 4) that make boxes (K, 4) of anchors (K, 4); all in cells."""
    wanted = boxes.xyxy_to_cxcywh(boxes_xyxy)
    factor = wanted[:, 2:].clamp(min=LEAST_CELLS) / anchors_cxcywh[:, 2:]
    return torch.cat([wanted[:, :2] - anchors_cxcywh[:, :2], factor.log()], -1)
