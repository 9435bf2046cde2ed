"""A detector of two stages on the maps of a backbone: regions that may hold something, then what each of them holds.

Papers: Ren et al., 2015, "Faster R-CNN" (region proposals, losses); Girshick, 2015, "Fast R-CNN" (a background class, a
box for each class); Lin et al., 2017, "Feature pyramid networks" (regions of a size on the map of their size); He et
al., 2017, "Mask R-CNN" (RoIAlign). Differs: convolutions are depthwise and pointwise, the pyramid is pyramid.py's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.experiments.detection.models.base import Targets
from cvlab.experiments.detection.models.fpn import LevelSeparable, Pyramid, separable
from cvlab.ops import assignment, boxes, nms
from cvlab.ops.anchors import match_by_iou
from cvlab.ops.average_precision import Detections
from cvlab.ops.roi_align import roi_align

ANCHOR_STRIDES = 6.0  # an anchor's side in strides of its map, for a square
RATIOS = (0.5, 1.0, 2.0)  # height over width, areas alike
RPN_HIGH, RPN_LOW, RPN_MOST = 0.7, 0.3, 128  # IoU of positives, of negatives; drawn from a picture
BEFORE_NMS, AFTER_NMS, PROPOSAL_IOU = 1000, 100, 0.7
HEAD_IOU, HEAD_MOST, HEAD_SHARE = 0.5, 64, 0.25  # of a picture's regions; the share of those that hold something
HEAD_SCALES = (10.0, 10.0, 5.0, 5.0)  # of the second stage's offsets, as in Fast R-CNN
BOX_GAIN = 2.0
MOST_GROWTH = math.log(1000 / 16)
REGION = 5  # cells of a region along a side
LEVEL_PX = 40.0  # regions up to this size are cut from the finest map, up to twice from the next, and so on
SMOOTH = 1 / 9


def encode(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Return the offsets (N, 4) that make boxes of anchors: dx, dy in sides of the anchor, log of the sides' ratios."""
    box, anchor = boxes.xyxy_to_cxcywh(boxes_xyxy), boxes.xyxy_to_cxcywh(anchors_xyxy)
    side = anchor[..., 2:].clamp(min=1e-3)
    return torch.cat([(box[..., :2] - anchor[..., :2]) / side, (box[..., 2:].clamp(min=1e-3) / side).log()], -1)


def decode(offsets: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Return the boxes (N, 4) that offsets make of anchors."""
    anchor = boxes.xyxy_to_cxcywh(anchors_xyxy)
    middle = anchor[..., :2] + offsets[..., :2] * anchor[..., 2:]
    sides = anchor[..., 2:] * offsets[..., 2:].clamp(max=MOST_GROWTH).exp()
    return boxes.cxcywh_to_xyxy(torch.cat([middle, sides], -1))


def anchors(places: Tensor) -> Tensor:
    """Return the anchors (P, A, 4) at points (P, 3) of `assignment.points`."""
    ratios = torch.tensor(RATIOS, device=places.device)
    wide, high = ANCHOR_STRIDES / ratios.sqrt(), ANCHOR_STRIDES * ratios.sqrt()
    half = torch.stack([wide, high], 1) / 2 * places[:, None, 2:]  # (P, A, 2)
    return torch.cat([places[:, None, :2] - half, places[:, None, :2] + half], 2)


@dataclass(frozen=True)
class Regions:
    """What the first stage gives: mixed maps, scores (N, P*A), offsets (N, P*A, 4), anchors (P*A, 4), pixels a side."""

    maps: list[Tensor]
    scores: Tensor
    offsets: Tensor
    anchors_xyxy: Tensor
    size_px: int


class FasterRcnn(nn.Module):
    """Two stages on three maps; `strides` are those of the maps in pixels of the picture."""

    strides = (8, 16, 32)

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: PositiveInt = 96, hidden: PositiveInt = 256
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pyramid = Pyramid(channels, width)
        self.regions = LevelSeparable(width, len(channels))
        self.objectness = nn.Conv2d(width, len(RATIOS), 1)
        self.offsets = nn.Conv2d(width, 4 * len(RATIOS), 1)
        self.look = nn.Sequential(separable(width), separable(width))
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(width * REGION * REGION, hidden), nn.SiLU(inplace=True), nn.Dropout(0.2)
        )
        self.classes = nn.Linear(hidden, num_classes + 1)  # the last one is the background
        self.boxes = nn.Linear(hidden, 4 * num_classes)
        for layer in (self.objectness, self.offsets, self.classes, self.boxes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Regions:
        """Return the first stage's verdict on maps (N, C_k, S / stride_k, S / stride_k), fine ones first."""
        mixed = self.pyramid(maps)
        places = assignment.grid_points([m.shape[2:] for m in mixed], self.strides).to(maps[0].device)
        hidden = [self.regions(m, level) for level, m in enumerate(mixed)]
        n = len(maps[0])
        scores = torch.cat([self.objectness(h).permute(0, 2, 3, 1).reshape(n, -1) for h in hidden], 1).float()
        offsets = torch.cat([self.offsets(h).permute(0, 2, 3, 1).reshape(n, -1, 4) for h in hidden], 1).float()
        size_px = mixed[0].shape[2] * self.strides[0]
        return Regions(mixed, scores, offsets, anchors(places).view(-1, 4), size_px)

    @torch.no_grad()
    def regions_of(self, found: Regions) -> list[tuple[Tensor, Tensor]]:
        """Return for each picture the regions (K, 4) that most likely hold something, before and after suppression.

        In pixels, the surest first.
        """
        result = []
        for scores, offsets in zip(found.scores, found.offsets, strict=True):
            best = scores.topk(min(BEFORE_NMS, len(scores)))
            place = decode(offsets[best.indices], found.anchors_xyxy[best.indices])
            place = boxes.clip(place, found.size_px, found.size_px)
            whole = (place[:, 2:] - place[:, :2]).amin(1) > 1
            place, score = place[whole], best.values[whole]
            result.append((place, place[nms.nms(place, score, PROPOSAL_IOU, AFTER_NMS)]))
        return result

    def proposals(self, found: Regions) -> list[Tensor]:
        """Return the regions (K, 4) of each picture that the second stage looks at."""
        return [after for _, after in self.regions_of(found)]

    def second(self, found: Regions, regions_xyxy: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return class scores (R, C + 1) and offsets (R, C, 4) of regions (R, 4) of the pictures `image` (R,)."""
        side = boxes.area(regions_xyxy).sqrt()
        level = (side / LEVEL_PX).clamp(min=1e-6).log2().ceil().long().clamp(0, len(self.strides) - 1)
        cut = found.maps[0].new_zeros(len(image), found.maps[0].shape[1], REGION, REGION)
        for k, stride in enumerate(self.strides):
            own = (level == k).nonzero()[:, 0]
            if len(own):
                part = roi_align(found.maps[k], regions_xyxy[own], image[own], REGION, 1 / stride)
                cut = cut.index_copy(0, own, part.to(cut.dtype))
        hidden = self.hidden(self.look(cut.contiguous(memory_format=torch.channels_last)))
        return self.classes(hidden).float(), self.boxes(hidden).float().view(-1, self.num_classes, 4)

    def losses(self, found: Regions, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss` and its parts: of the first stage, then of the second.

        Where whoever drew a box was not sure of it, both stages are to be as sure as that, and its offsets count less.
        """
        objectness, region = self._first_losses(found, targets)
        drawn = [self._drawn(place, *own) for place, own in zip(self.proposals(found), _own(targets), strict=True)]
        places, labels, sure, wanted = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        image = torch.repeat_interleave(
            torch.arange(len(drawn), device=places.device),
            torch.tensor([len(d[1]) for d in drawn], device=places.device),
        )
        scores, offsets = self.second(found, places, image)
        log_p = scores.log_softmax(1)
        right = log_p.gather(1, labels[:, None])[:, 0]
        class_loss = -(sure * right + (1 - sure) * log_p[:, -1]).sum() / max(len(labels), 1)
        held = (labels < self.num_classes).nonzero()[:, 0]
        aim = encode(wanted[held], places[held]) * places.new_tensor(HEAD_SCALES)
        apart = F.smooth_l1_loss(offsets[held, labels[held]], aim, beta=1.0, reduction="none").sum(1)
        box_loss = (sure[held] * apart).sum() / max(len(labels), 1)
        parts = {"rpn_class_loss": objectness, "rpn_box_loss": region, "class_loss": class_loss, "box_loss": box_loss}
        return {"loss": objectness + region + class_loss + BOX_GAIN * box_loss, **parts}

    def _first_losses(self, found: Regions, targets: Targets) -> tuple[Tensor, Tensor]:
        class_loss, box_loss = found.scores.sum() * 0, found.offsets.sum() * 0
        total = 0
        for scores, offsets, (own, _, sure) in zip(found.scores, found.offsets, _own(targets), strict=True):
            positive, negative, which = _sides(found.anchors_xyxy, own)
            positive = _some(positive, RPN_MOST // 2)
            negative = _some(negative, RPN_MOST - len(positive))
            total += len(positive) + len(negative)
            sure = sure[which[positive]]
            right = F.binary_cross_entropy_with_logits(scores[positive], sure, reduction="sum")
            wrong = F.binary_cross_entropy_with_logits(
                scores[negative], torch.zeros_like(scores[negative]), reduction="sum"
            )
            class_loss = class_loss + right + wrong
            if len(positive):
                aim = encode(own[which[positive]], found.anchors_xyxy[positive])
                apart = F.smooth_l1_loss(offsets[positive], aim, beta=SMOOTH, reduction="none").sum(1)
                box_loss = box_loss + (sure * apart).sum()
        return class_loss / max(total, 1), box_loss / max(total, 1)

    @torch.no_grad()
    def _drawn(self, places: Tensor, own: Tensor, labels: Tensor, sure: Tensor) -> tuple[Tensor, ...]:
        """Draw regions of a picture, its own boxes among them; return them, their labels, confidences and boxes."""
        places = torch.cat([own, places])
        if not len(own):
            places = places[:HEAD_MOST]
            nothing = torch.full((len(places),), self.num_classes, device=places.device)
            return places, nothing, sure.new_ones(len(places)), places
        overlap, which = boxes.iou(places, own).max(1)
        positive = _some((overlap >= HEAD_IOU).nonzero()[:, 0], round(HEAD_SHARE * HEAD_MOST))
        negative = _some((overlap < HEAD_IOU).nonzero()[:, 0], HEAD_MOST - len(positive))
        chosen = torch.cat([positive, negative])
        found = labels[which[chosen]].clone()
        found[len(positive) :] = self.num_classes
        trust = sure[which[chosen]].clone()
        trust[len(positive) :] = 1
        return places[chosen], found, trust, own[which[chosen]]

    def detections(self, found: Regions, size_px: int, floor: float, iou: float, most: int) -> list[Detections]:
        """Return what is found in each picture: scores of at least `floor`, without doubles of a class, best first."""
        proposals = self.proposals(found)
        counts = torch.tensor([len(place) for place in proposals], device=found.scores.device)
        image = torch.repeat_interleave(torch.arange(len(proposals), device=counts.device), counts)
        places = torch.cat(proposals)
        scores, offsets = self.second(found, places, image)
        probabilities = scores.softmax(1)[:, :-1]
        results = []
        for k in range(len(proposals)):
            own = (image == k).nonzero()[:, 0]
            row, label = (probabilities[own] >= floor).nonzero(as_tuple=True)
            region = own[row]
            score = probabilities[region, label]
            box = decode(offsets[region, label] / places.new_tensor(HEAD_SCALES), places[region])
            box = boxes.clip(box, size_px, size_px)
            kept = nms.batched_nms(box, score, label, iou, most)
            results.append(Detections(box[kept], score[kept], label[kept]))
        return results


def _own(targets: Targets) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the boxes (K, 4), labels (K,) and confidences (K,) of each picture, without the padding."""
    parts = zip(targets.boxes_xyxy, targets.labels, targets.confidence, strict=True)
    return [(box[mark >= 0], mark[mark >= 0], sure[mark >= 0]) for box, mark, sure in parts]


def _sides(anchors_xyxy: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which anchors hold something, which do not, and whose box each is nearest to."""
    sides, which = match_by_iou(boxes.iou(anchors_xyxy, own), RPN_HIGH, RPN_LOW)
    return (sides == 1).nonzero()[:, 0], (sides == 0).nonzero()[:, 0], which


def _some(indices: Tensor, most: int) -> Tensor:
    """Draw at most so many of some indices, without putting any back."""
    if len(indices) <= most:
        return indices
    return indices[torch.randperm(len(indices))[:most].to(indices.device)]
