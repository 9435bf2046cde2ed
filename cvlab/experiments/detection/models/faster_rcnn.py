"""A two-stage detector: a region proposal network on a feature pyramid, then a box head that classifies the proposals.

References: Ren et al., 2015, "Faster R-CNN" (region proposals, losses); Girshick, 2015, "Fast R-CNN" (a background
class, a box for each class); Lin et al., 2017, "Feature pyramid networks" (a region's level depends on its size); He et
al., 2017, "Mask R-CNN" (RoIAlign). Differences from the papers: convolutions are depthwise separable, and the pyramid
is that of fpn.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.experiments.detection.models.base import Targets, TwoStageHead
from cvlab.experiments.detection.models.fpn import FeaturePyramid, LevelSeparableConv, separable_conv
from cvlab.ops import assignment, boxes, nms
from cvlab.ops.anchors import match_by_iou
from cvlab.ops.average_precision import Detections
from cvlab.ops.roi_align import roi_align

ANCHOR_SCALE = 6.0  # a square anchor's side in strides of its level
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width, at the same area
RPN_POSITIVE_IOU, RPN_NEGATIVE_IOU, RPN_BATCH_PER_IMAGE = 0.7, 0.3, 128
RPN_BETA = 1 / 9  # of the smooth L1 loss
PRE_NMS_TOP_K, POST_NMS_TOP_K, PROPOSAL_NMS_IOU = 1000, 100, 0.7
MIN_PROPOSAL_PX = 1
ROI_POSITIVE_IOU, ROI_BATCH_PER_IMAGE, ROI_POSITIVE_FRACTION = 0.5, 64, 0.25
ROI_DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the box head's deltas, as in Fast R-CNN
BOX_LOSS_WEIGHT = 2.0
MAX_LOG_SCALE = math.log(1000 / 16)
ROI_SIZE = 5  # cells of a pooled region along a side
FINEST_LEVEL_PX = 40.0  # regions up to this size are pooled from the finest level, up to twice it from the next, ...


def encode(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Return the deltas (N, 4) from anchors to boxes: center shift in anchor sides, logarithms of the side ratios."""
    box, anchor = boxes.xyxy_to_cxcywh(boxes_xyxy), boxes.xyxy_to_cxcywh(anchors_xyxy)
    side = anchor[..., 2:].clamp(min=1e-3)
    return torch.cat([(box[..., :2] - anchor[..., :2]) / side, (box[..., 2:].clamp(min=1e-3) / side).log()], -1)


def decode(deltas: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Return the boxes_xyxy (N, 4) that deltas (N, 4) turn anchors (N, 4) into."""
    anchor = boxes.xyxy_to_cxcywh(anchors_xyxy)
    center = anchor[..., :2] + deltas[..., :2] * anchor[..., 2:]
    sides = anchor[..., 2:] * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return boxes.cxcywh_to_xyxy(torch.cat([center, sides], -1))


def anchors_at(points: Tensor) -> Tensor:
    """Return the anchors_xyxy (P, A, 4), in pixels, at points (P, 3) of `assignment.grid_points`."""
    ratios = torch.tensor(ASPECT_RATIOS, device=points.device)
    widths, heights = ANCHOR_SCALE / ratios.sqrt(), ANCHOR_SCALE * ratios.sqrt()
    half = torch.stack([widths, heights], 1) / 2 * points[:, None, 2:]  # (P, A, 2)
    return torch.cat([points[:, None, :2] - half, points[:, None, :2] + half], 2)


def match_anchors(anchors_xyxy: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of positive and of negative anchors (P, 4), and the matched box of each anchor, int64 (P,)."""
    labels, matched_box = match_by_iou(boxes.iou(anchors_xyxy, gt_boxes), RPN_POSITIVE_IOU, RPN_NEGATIVE_IOU)
    return (labels == 1).nonzero()[:, 0], (labels == 0).nonzero()[:, 0], matched_box


def subsample(indices: Tensor, max_samples: int) -> Tensor:
    """Sample at most `max_samples` of the indices without replacement, from torch's global generator."""
    if len(indices) <= max_samples:
        return indices
    return indices[torch.randperm(len(indices))[:max_samples].to(indices.device)]


class RpnOutputs(NamedTuple):
    """Predictions of the region proposal network for P * A anchors.

    maps: the pyramid's feature maps, highest resolution first. objectness_logits: (N, P*A). deltas: (N, P*A, 4).
    anchors_xyxy: (P*A, 4), in pixels. size_px: the side of the images.
    """

    maps: list[Tensor]
    objectness_logits: Tensor
    deltas: Tensor
    anchors_xyxy: Tensor
    size_px: int


class SampledProposals(NamedTuple):
    """Proposals to train the box head on, R in all.

    proposals_xyxy: (R, 4), in pixels. labels: int64 (R,), `num_classes` for background. confidence: (R,), that of the
    matched box. gt_boxes: the matched boxes (R, 4), meaningless for background.
    """

    proposals_xyxy: Tensor
    labels: Tensor
    confidence: Tensor
    gt_boxes: Tensor


class FasterRcnn(TwoStageHead[RpnOutputs]):
    """A region proposal network and a box head on three feature maps."""

    strides = (8, 16, 32)

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: PositiveInt = 96, hidden: PositiveInt = 256
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fpn = FeaturePyramid(channels, width)
        self.rpn_conv = LevelSeparableConv(width, len(channels))
        self.rpn_objectness = nn.Conv2d(width, len(ASPECT_RATIOS), 1)
        self.rpn_deltas = nn.Conv2d(width, 4 * len(ASPECT_RATIOS), 1)
        self.roi_conv = nn.Sequential(separable_conv(width), separable_conv(width))
        self.roi_fc = nn.Sequential(
            nn.Flatten(), nn.Linear(width * ROI_SIZE * ROI_SIZE, hidden), nn.SiLU(inplace=True), nn.Dropout(0.2)
        )
        self.cls_score = nn.Linear(hidden, num_classes + 1)  # the last class is the background
        self.bbox_pred = nn.Linear(hidden, 4 * num_classes)
        for layer in (self.rpn_objectness, self.rpn_deltas, self.cls_score, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> RpnOutputs:
        """Run the first stage on feature maps (N, C_k, S / stride_k, S / stride_k), highest resolution first."""
        maps = self.fpn(features)
        points = assignment.grid_points([m.shape[2:] for m in maps], self.strides).to(features[0].device)
        hidden = [self.rpn_conv(m, level) for level, m in enumerate(maps)]
        n = len(features[0])
        logits = torch.cat([self.rpn_objectness(h).permute(0, 2, 3, 1).reshape(n, -1) for h in hidden], 1).float()
        deltas = torch.cat([self.rpn_deltas(h).permute(0, 2, 3, 1).reshape(n, -1, 4) for h in hidden], 1).float()
        size_px = maps[0].shape[2] * self.strides[0]
        return RpnOutputs(maps, logits, deltas, anchors_at(points).view(-1, 4), size_px)

    @torch.no_grad()
    def generate_proposals(self, outputs: RpnOutputs) -> list[tuple[Tensor, Tensor]]:
        """Return each image's proposals (K, 4), in pixels, before and after NMS, highest objectness first."""
        proposals = []
        for logits, deltas in zip(outputs.objectness_logits, outputs.deltas, strict=True):
            top = logits.topk(min(PRE_NMS_TOP_K, len(logits)))
            box = decode(deltas[top.indices], outputs.anchors_xyxy[top.indices])
            box = boxes.clip(box, outputs.size_px, outputs.size_px)
            large_enough = (box[:, 2:] - box[:, :2]).amin(1) > MIN_PROPOSAL_PX
            box, score = box[large_enough], top.values[large_enough]
            proposals.append((box, box[nms.nms(box, score, PROPOSAL_NMS_IOU, POST_NMS_TOP_K)]))
        return proposals

    def _proposals(self, outputs: RpnOutputs) -> list[Tensor]:
        """Return each image's proposals (K, 4) after NMS."""
        return [after for _, after in self.generate_proposals(outputs)]

    def box_head(self, outputs: RpnOutputs, proposals_xyxy: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits (R, C + 1) and deltas (R, C, 4) of proposals (R, 4) in the images `image`, int64 (R,)."""
        side = boxes.area(proposals_xyxy).sqrt()
        level = (side / FINEST_LEVEL_PX).clamp(min=1e-6).log2().ceil().long().clamp(0, len(self.strides) - 1)
        pooled = outputs.maps[0].new_zeros(len(image), outputs.maps[0].shape[1], ROI_SIZE, ROI_SIZE)
        for k, stride in enumerate(self.strides):
            at_level = (level == k).nonzero()[:, 0]
            if len(at_level):
                rois = roi_align(outputs.maps[k], proposals_xyxy[at_level], image[at_level], ROI_SIZE, 1 / stride)
                pooled = pooled.index_copy(0, at_level, rois.to(pooled.dtype))
        hidden = self.roi_fc(self.roi_conv(pooled.contiguous(memory_format=torch.channels_last)))
        return self.cls_score(hidden).float(), self.bbox_pred(hidden).float().view(-1, self.num_classes, 4)

    def losses(self, outputs: RpnOutputs, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return `loss` and the classification and box losses of both stages.

        A box's confidence is the target probability of both classifiers, and weights its box losses.
        """
        rpn_class_loss, rpn_box_loss = self._rpn_losses(outputs, targets)
        per_image = [
            self.sample_proposals(proposals, *gt)
            for proposals, gt in zip(self._proposals(outputs), targets.unpad(), strict=True)
        ]
        proposals, labels, confidence, gt_boxes = (torch.cat(parts) for parts in zip(*per_image, strict=True))
        logits, deltas = self.box_head(outputs, proposals, _image_indices([image.labels for image in per_image]))
        log_probs = logits.log_softmax(1)
        fg_log_prob = log_probs.gather(1, labels[:, None])[:, 0]
        bg_log_prob = log_probs[:, -1]
        class_loss = -(confidence * fg_log_prob + (1 - confidence) * bg_log_prob).sum() / max(len(labels), 1)
        fg = (labels < self.num_classes).nonzero()[:, 0]
        target_deltas = encode(gt_boxes[fg], proposals[fg]) * proposals.new_tensor(ROI_DELTA_WEIGHTS)
        smooth_l1 = F.smooth_l1_loss(deltas[fg, labels[fg]], target_deltas, beta=1.0, reduction="none").sum(1)
        box_loss = (confidence[fg] * smooth_l1).sum() / max(len(labels), 1)
        loss = rpn_class_loss + rpn_box_loss + class_loss + BOX_LOSS_WEIGHT * box_loss
        rpn_losses = {"rpn_class_loss": rpn_class_loss, "rpn_box_loss": rpn_box_loss}
        return {"loss": loss, **rpn_losses, "class_loss": class_loss, "box_loss": box_loss}

    def _rpn_losses(self, outputs: RpnOutputs, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return the first stage's classification and box loss, means over the sampled anchors."""
        class_loss, box_loss = outputs.objectness_logits.sum() * 0, outputs.deltas.sum() * 0
        num_sampled = 0
        images = zip(outputs.objectness_logits, outputs.deltas, targets.unpad(), strict=True)
        for logits, deltas, (gt_boxes, _, gt_confidence) in images:
            positive, negative, matched_box = match_anchors(outputs.anchors_xyxy, gt_boxes)
            positive = subsample(positive, RPN_BATCH_PER_IMAGE // 2)
            negative = subsample(negative, RPN_BATCH_PER_IMAGE - len(positive))
            num_sampled += len(positive) + len(negative)
            confidence = gt_confidence[matched_box[positive]]
            positive_loss = F.binary_cross_entropy_with_logits(logits[positive], confidence, reduction="sum")
            negative_loss = F.binary_cross_entropy_with_logits(
                logits[negative], torch.zeros_like(logits[negative]), reduction="sum"
            )
            class_loss = class_loss + positive_loss + negative_loss
            if len(positive):
                target_deltas = encode(gt_boxes[matched_box[positive]], outputs.anchors_xyxy[positive])
                smooth_l1 = F.smooth_l1_loss(deltas[positive], target_deltas, beta=RPN_BETA, reduction="none").sum(1)
                box_loss = box_loss + (confidence * smooth_l1).sum()
        return class_loss / max(num_sampled, 1), box_loss / max(num_sampled, 1)

    @torch.no_grad()
    def sample_proposals(
        self, proposals: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_confidence: Tensor
    ) -> SampledProposals:
        """Sample proposals (K, 4) of one image to train on; its ground-truth boxes are added to the proposals."""
        proposals = torch.cat([gt_boxes, proposals])
        if not len(gt_boxes):
            proposals = proposals[:ROI_BATCH_PER_IMAGE]
            background = torch.full((len(proposals),), self.num_classes, device=proposals.device)
            return SampledProposals(proposals, background, gt_confidence.new_ones(len(proposals)), proposals)
        iou, matched_box = boxes.iou(proposals, gt_boxes).max(1)
        positive = subsample(
            (iou >= ROI_POSITIVE_IOU).nonzero()[:, 0], round(ROI_POSITIVE_FRACTION * ROI_BATCH_PER_IMAGE)
        )
        negative = subsample((iou < ROI_POSITIVE_IOU).nonzero()[:, 0], ROI_BATCH_PER_IMAGE - len(positive))
        sampled = torch.cat([positive, negative])
        labels = gt_labels[matched_box[sampled]].clone()
        labels[len(positive) :] = self.num_classes
        confidence = gt_confidence[matched_box[sampled]].clone()
        confidence[len(positive) :] = 1
        return SampledProposals(proposals[sampled], labels, confidence, gt_boxes[matched_box[sampled]])

    def postprocess(
        self, outputs: RpnOutputs, size_px: int, score_threshold: float, nms_iou: float, max_detections: int
    ) -> list[Detections]:
        """Return each image's detections; see `DetectionHead.postprocess`."""
        per_image = self._proposals(outputs)
        image = _image_indices(per_image)
        proposals = torch.cat(per_image)
        logits, deltas = self.box_head(outputs, proposals, image)
        probs = logits.softmax(1)[:, :-1]
        results = []
        for k in range(len(per_image)):
            in_image = (image == k).nonzero()[:, 0]
            row, label = (probs[in_image] >= score_threshold).nonzero(as_tuple=True)
            proposal = in_image[row]
            score = probs[proposal, label]
            box = decode(deltas[proposal, label] / proposals.new_tensor(ROI_DELTA_WEIGHTS), proposals[proposal])
            box = boxes.clip(box, size_px, size_px)
            keep = nms.batched_nms(box, score, label, nms_iou, max_detections)
            results.append(Detections(box[keep], score[keep], label[keep]))
        return results


def _image_indices(per_image: Sequence[Tensor]) -> Tensor:
    """Return for each row of the images' concatenated tensors the image that it is from, int64 (R,)."""
    device = per_image[0].device
    counts = torch.tensor([len(rows) for rows in per_image], device=device)
    return torch.repeat_interleave(torch.arange(len(per_image), device=device), counts)
