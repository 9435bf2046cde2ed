"""The two-stage detector of a course: regions from nine anchors in each cell of a coarse map, then a class for each.

Paper: Ren et al., 2015, "Faster R-CNN". Source: EECS 498, assignment 5. Differs from the paper as the course does: the
second stage refines no box and knows no background, a detection's score is the first stage's alone. Differs from the
course: negatives are drawn without replacement, and a picture without objects has a finite loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.experiments.detection.models.base import Targets
from cvlab.experiments.detection.models.faster_rcnn import decode, encode
from cvlab.ops import anchors, boxes, nms
from cvlab.ops.average_precision import Detections
from cvlab.ops.roi_align import roi_align

NUM_ANCHORS = len(anchors.COURSE_SHAPES)
HIGH, LOW = 0.7, 0.3  # IoU of positives, of negatives
BOX_GAIN = 5.0
REGION = 2  # cells of a region along a side
PROPOSAL_IOU, PROPOSALS = 0.7, 100


class Found(NamedTuple):
    """What the first stage says of N pictures with P = A * h * w anchors, flat in the order (A, h, w).

    `maps` (N, D, h, w) as they were given; `scores` (N, P, 2) before the sigmoid: something, nothing; `offsets`
    (N, P, 4): dx, dy in sides of the anchor, logarithms of the sides' ratios.
    """

    maps: Tensor
    scores: Tensor
    offsets: Tensor


class Positives(NamedTuple):
    """The anchors of a batch that hold something, K in all: picture, anchor, label (K,); the box (K, 4) in cells."""

    image: Tensor
    anchor: Tensor
    labels: Tensor
    boxes_xyxy: Tensor


class FasterRcnnCourse(nn.Module):
    """Two stages on the last map of a backbone, 7 x 7 cells for pictures of 224 pixels."""

    strides = (32,)
    is_last = True
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
        self.regions = nn.Sequential(nn.Conv2d(channels[-1], width, 3, padding=1), nn.Dropout(dropout), nn.LeakyReLU())
        self.propose = nn.Conv2d(width, 6 * NUM_ANCHORS, 1)
        self.classes = nn.Sequential(
            nn.Linear(channels[-1], hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, num_classes)
        )
        self.register_buffer("shapes", torch.tensor(anchors.COURSE_SHAPES).float(), persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Found:
        """Look at the last map (N, D, h, w). The first stage's channels: A times two scores, A times four offsets."""
        raw = self.propose(self.regions(maps[-1])).float()  # (N, 6A, h, w)
        scores, offsets = raw.split([2 * NUM_ANCHORS, 4 * NUM_ANCHORS], 1)
        return Found(maps[-1], _flat(scores), _flat(offsets))

    def anchors(self, found: Found) -> Tensor:
        """Return the anchors_xyxy (P, 4) in cells."""
        centres = anchors.grid_centers(*found.maps.shape[2:]).to(self.shapes)
        return anchors.generate_anchors(centres, self.shapes).flatten(0, 2)

    def losses(self, found: Found, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss` and its parts, sums over a picture's anchors and means over pictures.

        `rpn_loss` is the first stage's: its `rpn_class_loss` and five times its `rpn_box_loss`.
        """
        positives, is_negative = self.matched(found, targets)
        image, anchor = positives.image, positives.anchor
        count, pictures = len(image), len(found.scores)
        nothing = found.scores[is_negative]
        nothing = nothing[torch.randperm(len(nothing))[:count].to(nothing.device)]
        scores = torch.cat([found.scores[image, anchor], nothing])
        wanted = torch.zeros_like(scores)
        wanted[:count, 0] = 1
        wanted[count:, 1] = 1
        rpn_class_loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum") / pictures
        own = self.anchors(found)[anchor]
        offsets = found.offsets[image, anchor]
        rpn_box_loss = F.smooth_l1_loss(offsets, encode(positives.boxes_xyxy, own), reduction="sum") / pictures
        regions = self.clipped(decode(offsets.detach(), own), found)
        class_loss = F.cross_entropy(self.second(found, regions, image), positives.labels, reduction="sum") / pictures
        rpn_loss = rpn_class_loss + BOX_GAIN * rpn_box_loss
        parts = {"rpn_class_loss": rpn_class_loss, "rpn_box_loss": rpn_box_loss, "class_loss": class_loss}
        return {"loss": rpn_loss + class_loss, "rpn_loss": rpn_loss, **parts}

    @torch.no_grad()
    def matched(self, found: Found, targets: Targets) -> tuple[Positives, Tensor]:
        """Return which anchors hold something, and which, bool (N, P), hold nothing."""
        every = self.anchors(found)
        is_negative = torch.zeros(found.scores.shape[:2], dtype=torch.bool, device=every.device)
        chosen = []
        for k, (places, marks) in enumerate(zip(targets.boxes_xyxy, targets.labels, strict=True)):
            own, labels = places[marks >= 0].to(every) / self.strides[0], marks[marks >= 0]
            sides, which = anchors.match_by_iou(boxes.iou(every, own), HIGH, LOW)
            is_negative[k] = sides == 0
            anchor = (sides == 1).nonzero()[:, 0]
            box = which[anchor]
            chosen.append(Positives(torch.full_like(anchor, k), anchor, labels[box], own[box]))
        return Positives(*(torch.cat(parts) for parts in zip(*chosen, strict=True))), is_negative

    def clipped(self, regions_xyxy: Tensor, found: Found) -> Tensor:
        """Return regions (K, 4) in cells, cut at the edges of the map."""
        return boxes.clip(regions_xyxy, found.maps.shape[3], found.maps.shape[2])

    def second(self, found: Found, regions_xyxy: Tensor, image: Tensor) -> Tensor:
        """Return class scores (K, C) of regions (K, 4), in cells, of the pictures `image` (K,)."""
        cut = roi_align(found.maps, regions_xyxy, image, REGION)  # (K, D, 2, 2)
        scores: Tensor = self.classes(cut.mean((2, 3)).to(self.shapes)).float()
        return scores

    @torch.no_grad()
    def regions_of(self, found: Found, floor: float = 0.5) -> list[tuple[Tensor, Tensor]]:
        """Return for each picture the regions (K, 4) at least `floor` sure, before and after suppression.

        In pixels, before it by anchor, after it the surest first.
        """
        proposed = self._proposed(found, floor)
        return [(before * self.strides[0], after * self.strides[0]) for before, after, _ in proposed]

    def _proposed(self, found: Found, floor: float) -> list[tuple[Tensor, Tensor, Tensor]]:
        every = self.anchors(found)
        result = []
        for scores, offsets in zip(found.scores[..., 0].sigmoid(), found.offsets, strict=True):
            sure = scores >= floor
            regions, score = self.clipped(decode(offsets[sure], every[sure]), found), scores[sure]
            best = nms.nms(regions, score, PROPOSAL_IOU, PROPOSALS)
            result.append((regions, regions[best], score[best]))
        return result

    def detections(self, found: Found, size_px: int, floor: float, iou: float, most: int) -> list[Detections]:
        """Return what is found in each picture: scores of at least `floor`, without doubles of a class, best first."""
        results = []
        for k, (_, regions, score) in enumerate(self._proposed(found, floor)):
            image = torch.full((len(regions),), k, dtype=torch.int64, device=regions.device)
            label = self.second(found, regions, image).argmax(1)
            places = regions * self.strides[0]
            kept = nms.batched_nms(places, score, label, iou, most)
            results.append(Detections(places[kept], score[kept], label[kept]))
        return results


def _flat(raw: Tensor) -> Tensor:
    """Return (N, A * D, h, w) as (N, P, D), anchors in the order (A, h, w)."""
    flat: Tensor = raw.unflatten(1, (NUM_ANCHORS, -1)).movedim(2, -1).flatten(1, 3)
    return flat
