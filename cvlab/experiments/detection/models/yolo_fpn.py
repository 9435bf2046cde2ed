"""An anchor-free detector on the maps of a backbone: features mixed over three resolutions, one head for all of them.

Papers: Tian et al., 2019, "FCOS" (a box is four distances from a point); Feng et al., 2021, "TOOD" (which points are
responsible, and how sure they are to be); the pyramid is that of pyramid.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.experiments.detection.models.base import Targets
from cvlab.experiments.detection.models.fpn import Pyramid, Tower
from cvlab.ops import assignment, boxes, nms
from cvlab.ops.average_precision import Detections

PRIOR = 1e-3  # the probability that every point starts with: a few of thousands are right
CANDIDATES = 1000  # go into the search for doubles, the best ones
BOX_GAIN = 2.5  # as in PP-YOLOE; the classes' loss counts once


class YoloFpn(nn.Module):
    """Scores and boxes at every cell of three maps; `strides` are those of the maps in pixels of the picture."""

    strides = (8, 16, 32)
    outputs = ("scores", "boxes_xyxy")

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: PositiveInt = 96, depth: PositiveInt = 2
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pyramid = Pyramid(channels, width)
        self.classes = Tower(width, num_classes, len(channels), depth)
        self.boxes = Tower(width, 4, len(channels), depth)
        self.scales = nn.Parameter(torch.ones(len(channels)))
        bias = self.classes.last.bias
        assert bias is not None
        nn.init.constant_(bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (N, P, C) before the sigmoid, boxes_xyxy (N, P, 4) in pixels, and points (P, 3): x, y, stride.

        `maps` are (N, C_k, S / stride_k, S / stride_k), fine ones first.
        """
        mixed = self.pyramid(maps)
        points = assignment.grid_points([m.shape[2:] for m in mixed], self.strides).to(maps[0].device)
        scores = torch.cat([m.flatten(2) for m in self.classes(mixed)], 2).mT.float()  # (N, P, C)
        raw = [
            F.softplus(m.flatten(2).float() * scale) for m, scale in zip(self.boxes(mixed), self.scales, strict=True)
        ]
        distances = torch.cat(raw, 2).mT * points[:, 2:]  # (N, P, 4): left, top, right, bottom
        centres = points[:, :2]
        return scores, torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], 2), points

    def plain(self, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what is found as other programs take it, by the names in `outputs`: scores in [0, 1], boxes."""
        return found[0].sigmoid(), found[1]

    def losses(self, found: tuple[Tensor, Tensor, Tensor], targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss` and its parts, means over what the points are responsible for.

        A point is to be as sure of a class as its box fits, times the confidence of who drew the box (Hinton et al.,
        2015, "Distilling the knowledge in a neural network": what a teacher half knows is worth learning).
        """
        scores, boxes_xyxy, points = found
        with torch.no_grad():
            chosen = assignment.assign_task_aligned(
                scores.sigmoid(), boxes_xyxy, points, targets.boxes_xyxy, targets.labels
            )
        image, point = chosen.image, chosen.point
        quality = chosen.quality * targets.confidence[image, chosen.box]
        total = quality.sum().clamp(min=1.0)
        wanted = torch.zeros_like(scores)
        wanted[image, point, targets.labels[image, chosen.box]] = quality
        class_loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum") / total
        overlap = boxes.paired_giou(boxes_xyxy[image, point], targets.boxes_xyxy[image, chosen.box])
        box_loss = BOX_GAIN * ((1 - overlap) * quality).sum() / total
        return {"loss": class_loss + box_loss, "class_loss": class_loss, "box_loss": box_loss}

    def detections(
        self, found: tuple[Tensor, Tensor, Tensor], size_px: int, floor: float, iou: float, most: int
    ) -> list[Detections]:
        """Return what is found in each picture: scores of at least `floor`, without doubles of a class, best first."""
        scores, boxes_xyxy, _ = found
        results = []
        for probability, place in zip(scores.sigmoid(), boxes_xyxy, strict=True):
            point, label = (probability >= floor).nonzero(as_tuple=True)
            score, box = probability[point, label], place[point]
            if len(score) > CANDIDATES:
                score, best = score.topk(CANDIDATES)
                box, label = box[best], label[best]
            box = boxes.clip(box, size_px, size_px)
            kept = nms.batched_nms(box, score, label, iou, most)
            results.append(Detections(box[kept], score[kept], label[kept]))
        return results
