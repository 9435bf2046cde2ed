"""Average precision of detections by the rules of PASCAL VOC and COCO, confusion matrix, and recall by object size.

References:
    Everingham et al., 2010, "The PASCAL VOC challenge", section 4.2 (`voc07`: mean precision at 11 recalls; `voc`:
    area under the curve, as of 2010).
    Lin et al., 2014, "Microsoft COCO" (`coco`: mean precision at 101 recalls, at most 100 detections of a class in an
    image).

Differences from the paper:
    None in the results; instead of looping over images and classes, all of them are matched at once, detection rank by
    detection rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.ops import boxes

RULES = ("voc07", "voc", "coco")
IOU_THRESHOLDS = tuple(0.5 + k * ((0.95 - 0.5) / 9) for k in range(10))  # to the last bit as pycocotools has them
COCO_MAX_DETECTIONS = 100
AREA_RANGES = {  # in square pixels, of COCO
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, float("inf")),
}
MAX_MIN_IOU = 1 - 1e-10  # the limit that pycocotools puts on a threshold
BACKGROUND, IGNORED = -1, -2  # in place of the index of a box
MAX_CHUNK_ELEMENTS = 500_000  # in a tensor of IoUs


@dataclass(frozen=True)
class Detections:
    """The detections of one image: boxes_xyxy (N, 4) in pixels, scores (N,) in [0, 1], labels int64 (N,)."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class GroundTruth:
    """The ground truth of one image: boxes_xyxy (M, 4) in pixels, labels int64 (M,), difficult and crowd bool (M,).

    Difficult boxes are ignored: finding one is neither right nor wrong, missing one neither. So are crowds, boxes
    around many objects (None: there are none); their overlap with a detection is the fraction of the detection that
    they cover, and a crowd ignores all detections that match no other box.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    difficult: Tensor
    crowd: Tensor | None = None

    @property
    def is_crowd(self) -> Tensor:
        """Which boxes are crowds, bool (M,)."""
        return torch.zeros_like(self.difficult) if self.crowd is None else self.crowd

    @property
    def is_ignored(self) -> Tensor:
        """Which boxes are not counted, bool (M,): difficult ones and crowds."""
        return self.difficult | self.is_crowd


@dataclass(frozen=True)
class DetectionMetrics:
    """Average precision over a data set by one of `RULES`.

    `ap50` and `ap50_95`, float64 (C,) in [0, 1], are the average precision of each class at an IoU of 0.5 and its mean
    over all thresholds, nan for a class without ground truth; `map50` and `map50_95` are the means over the other
    classes. `recalls` and `precisions` hold the curve of each class at an IoU of 0.5, a point for each detection by
    descending score. `num_truths`, int64 (C,), counts the ground-truth boxes that are not difficult.
    """

    map_rule: str
    map50: float
    map50_95: float
    ap50: Tensor
    ap50_95: Tensor
    recalls: tuple[Tensor, ...]
    precisions: tuple[Tensor, ...]
    num_truths: Tensor


@dataclass(frozen=True)
class _GroupedBoxes:
    """The boxes of all images in one tensor, sorted by group: a group is one class in one image."""

    boxes_xyxy: Tensor  # float64 (N, 4)
    keys: Tensor  # int64 (N,), image * num_classes + class of each box
    order: Tensor  # int64 (N,), the index of each box before sorting
    groups: Tensor  # int64 (G,), the distinct keys
    starts: Tensor  # int64 (G,), the first box of each group
    counts: Tensor  # int64 (G,)


def _group(boxes_xyxy: Sequence[Tensor], keys: Tensor, order: Tensor) -> _GroupedBoxes:
    """Return the boxes of images in an order that sorts their keys."""
    flat = torch.cat(list(boxes_xyxy)).double() if boxes_xyxy else torch.empty(0, 4).double()
    groups, counts = torch.unique_consecutive(keys[order], return_counts=True)
    return _GroupedBoxes(flat[order], keys[order], order, groups, counts.cumsum(0) - counts, counts)


def _group_keys(labels: Sequence[Tensor], num_classes: int) -> Tensor:
    """Return image * num_classes + class of each box, from the labels of each image."""
    images = torch.repeat_interleave(torch.arange(len(labels)), torch.tensor([len(x) for x in labels]).long())
    flat = torch.cat(list(labels)) if labels else torch.empty(0, dtype=torch.int64)
    assert bool(((flat >= 0) & (flat < num_classes)).all()), "a label that is no class"
    return images * num_classes + flat


def evaluate(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    num_classes: int,
    rule: str = "voc",
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> DetectionMetrics:
    """Compute the average precision of detections. Of detections with equal scores the first one ranks first.

    Args:
        detections: One for each image.
        truths: The ground truth of the same images.
        num_classes: C; labels are in [0, C).
        rule: One of `RULES`.
        thresholds: T values of IoU in [0, 1], the first of them 0.5.

    Returns:
        Average precision by class and its means.
    """
    assert rule in RULES, rule
    assert len(detections) == len(truths)
    assert thresholds[0] == 0.5
    keys = _group_keys([d.labels for d in detections], num_classes)
    scores = torch.cat([d.scores for d in detections]).double() if detections else torch.empty(0).double()
    by_score = torch.argsort(scores, descending=True, stable=True)
    order = by_score[torch.argsort(keys[by_score], stable=True)]
    detected = _group([d.boxes_xyxy for d in detections], keys, order)
    keys = _group_keys([t.labels for t in truths], num_classes)
    true = _group([t.boxes_xyxy for t in truths], keys, torch.argsort(keys, stable=True))
    ignored, crowd = (
        torch.cat(flags)[true.order] if flags else torch.empty(0, dtype=torch.bool)
        for flags in ([t.is_ignored for t in truths], [t.is_crowd for t in truths])
    )
    outcomes = _Matcher(detected, true, ignored, crowd, torch.tensor(thresholds).double(), rule == "coco").match()
    rank = torch.arange(len(detected.keys)) - torch.repeat_interleave(detected.starts, detected.counts)
    is_counted = rank < COCO_MAX_DETECTIONS if rule == "coco" else torch.ones_like(rank, dtype=torch.bool)
    true_labels = true.keys % num_classes if num_classes else true.keys
    num_truths = torch.bincount(true_labels[~ignored], minlength=num_classes)
    return _summarize(detected, scores, outcomes, is_counted, num_truths, rule)


@dataclass(frozen=True)
class _Matcher:
    """Matches detections with the ground truth of their image and class, at T thresholds of IoU."""

    detected: _GroupedBoxes
    true: _GroupedBoxes
    ignored: Tensor  # bool (M,), of the sorted ground truth: difficult or a crowd
    crowd: Tensor  # bool (M,), of the sorted ground truth
    thresholds: Tensor  # float64 (T,)
    is_coco: bool

    def match(self) -> Tensor:
        """Return the outcome of each sorted detection, int8 (N, T): 1 right, 0 wrong, -1 ignored."""
        detected, true = self.detected, self.true
        outcomes = torch.zeros(len(detected.keys), len(self.thresholds), dtype=torch.int8)
        true_group = torch.searchsorted(true.groups, detected.groups)
        has_truth = true_group < len(true.groups)
        has_truth[has_truth.clone()] = true.groups[true_group[has_truth]] == detected.groups[has_truth]
        group = has_truth.nonzero()[:, 0]
        pairs = torch.stack([group, true_group[group]], 1)  # of a group of detections and one of ground truth
        sizes = torch.stack([detected.counts[pairs[:, 0]], true.counts[pairs[:, 1]]], 1)
        # Groups whose sizes are alike to a factor of two go together: padding makes them at most 4 times larger.
        size_class = sizes.double().log2().ceil() @ torch.tensor([64.0, 1.0]).double()
        order = torch.argsort(size_class)
        for bucket in order.split(torch.unique_consecutive(size_class[order], return_counts=True)[1].tolist()):
            max_detections, max_truths = sizes[bucket].amax(0).tolist()
            for chunk in bucket.split(max(1, MAX_CHUNK_ELEMENTS // (max_detections * max_truths))):
                rows, matched = self._match_groups(pairs[chunk], max_detections, max_truths)
                outcomes[rows] = matched
        return outcomes

    def _match_groups(self, pairs: Tensor, max_detections: int, max_truths: int) -> tuple[Tensor, Tensor]:
        """Return the detections (K,) of some pairs of groups (G, 2) and their outcomes (K, T)."""
        rows, is_detection = _padded_indices(self.detected, pairs[:, 0], max_detections)  # (G, D)
        columns, is_truth = _padded_indices(self.true, pairs[:, 1], max_truths)  # (G, M)
        detected_xyxy, true_xyxy = self.detected.boxes_xyxy[rows], self.true.boxes_xyxy[columns]
        iou = boxes.paired_iou(detected_xyxy[:, :, None], true_xyxy[:, None])  # (G, D, M)
        crowd = (self.crowd[columns] & is_truth)[:, None].expand_as(iou)
        if crowd.any():
            coverage = boxes.paired_coverage(detected_xyxy[:, :, None], true_xyxy[:, None])
            crowd_overlap = torch.where(crowd, coverage, -1.0).amax(2)  # (G, D)
        else:
            crowd_overlap = torch.full_like(iou[..., 0], -1.0)
        iou[~is_truth[:, None].expand_as(iou) | crowd] = -1
        difficult = self.ignored[columns] & is_truth  # (G, M)
        match = _match_coco if self.is_coco else _match_voc
        outcomes = match(iou, difficult, self.thresholds)
        min_overlap = self.thresholds.clamp(max=MAX_MIN_IOU) if self.is_coco else self.thresholds
        is_in_crowd = (crowd_overlap[..., None] >= min_overlap) & (outcomes == 0)
        return rows[is_detection], outcomes.masked_fill(is_in_crowd, -1)[is_detection]


def _padded_indices(grouped: _GroupedBoxes, groups: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the boxes of groups (G,), padded to (G, length), and which of them are not padding."""
    offsets = torch.arange(length)
    is_box = offsets < grouped.counts[groups, None]
    return (grouped.starts[groups, None] + offsets).clamp(max=len(grouped.keys) - 1), is_box


def _match_voc(iou: Tensor, difficult: Tensor, thresholds: Tensor) -> Tensor:
    """Match each detection to the box that it overlaps most; of several for one box the highest-scoring is right.

    iou: (G, D, M), detections by descending score; difficult: bool (G, M); returns outcomes int8 (G, D, T).
    """
    max_iou, box = iou.max(2)  # (G, D)
    is_match = max_iou[..., None] >= thresholds  # (G, D, T)
    is_ignored = is_match & difficult.gather(1, box)[..., None]
    num_groups, num_detections, num_thresholds = is_match.shape
    box = box[..., None].expand_as(is_match)
    rank = torch.arange(num_detections)[:, None].expand_as(is_match)
    first = torch.full((num_groups, iou.shape[2], num_thresholds), num_detections)  # rank of a box's first match
    first = first.scatter_reduce(1, box, torch.where(is_match, rank, num_detections), "amin")  # (G, M, T)
    is_correct = is_match & (first.gather(1, box) == rank)
    return torch.where(is_ignored, -1, is_correct.to(torch.int8)).to(torch.int8)


def _match_coco(iou: Tensor, difficult: Tensor, thresholds: Tensor) -> Tensor:
    """Match detections, the highest-scoring first, each to the free box that it overlaps most.

    A detection that gets none is ignored if it overlaps a difficult box enough; such a box may be matched repeatedly.
    Shapes as in `_match_voc`.
    """
    num_groups, num_detections, num_boxes = iou.shape
    is_free = torch.ones(num_groups, len(thresholds), num_boxes, dtype=torch.bool)
    min_iou = thresholds.clamp(max=MAX_MIN_IOU)[None, :, None]
    outcomes = torch.zeros(num_groups, num_detections, len(thresholds), dtype=torch.int8)
    is_counted = ~difficult[:, None]
    # Of equal overlaps the last one wins, as in pycocotools.
    tie_break = torch.arange(num_boxes, dtype=iou.dtype) * 1e-13
    for k in range(num_detections):
        iou_k = iou[:, k, None]  # (G, 1, M)
        is_enough = iou_k >= min_iou
        is_candidate = is_enough & is_free & is_counted  # (G, T, M)
        value, box = torch.where(is_candidate, iou_k + tie_break, -1.0).max(2)
        is_correct = value >= 0
        is_free.scatter_(2, box[..., None], is_free.gather(2, box[..., None]) & ~is_correct[..., None])
        is_ignored = (is_enough & difficult[:, None]).any(2) & ~is_correct
        outcomes[:, k] = torch.where(is_correct, 1, torch.where(is_ignored, -1, 0)).to(torch.int8)
    return outcomes


def _summarize(
    detected: _GroupedBoxes, scores: Tensor, outcomes: Tensor, is_counted: Tensor, num_truths: Tensor, rule: str
) -> DetectionMetrics:
    """Return precision, recall and average precision of each class, from the outcomes of sorted detections (N, T)."""
    num_classes = len(num_truths)
    labels = detected.keys % max(num_classes, 1)
    # By descending score over all images; of equal scores the earlier image, then the earlier detection, comes first.
    by_score = torch.argsort(scores[detected.order], descending=True, stable=True)
    by_class = by_score[torch.argsort(labels[by_score], stable=True)]
    by_class = by_class[is_counted[by_class]]
    ends = torch.bincount(labels[by_class], minlength=num_classes).cumsum(0).tolist()
    ap = torch.full((num_classes, outcomes.shape[1]), torch.nan, dtype=torch.float64)
    recalls, precisions = [], []
    for label, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        class_outcomes = outcomes[by_class[start:end]]  # (K, T)
        num_correct = (class_outcomes == 1).cumsum(0).double()
        num_incorrect = (class_outcomes == 0).cumsum(0).double()
        total = int(num_truths[label])
        recall = num_correct / max(total, 1)
        precision = num_correct / (num_correct + num_incorrect).clamp(min=1)
        recalls.append(recall[:, 0].float())
        precisions.append(precision[:, 0].float())
        if total:
            ap[label] = average_precision(recall, precision, rule)
    known = ap[num_truths > 0]
    return DetectionMetrics(
        map_rule=rule,
        map50=float(known[:, 0].mean()) if len(known) else float("nan"),
        map50_95=float(known.mean()) if len(known) else float("nan"),
        ap50=ap[:, 0],
        ap50_95=ap.mean(1),
        recalls=tuple(recalls),
        precisions=tuple(precisions),
        num_truths=num_truths,
    )


def average_precision(recall: Tensor, precision: Tensor, rule: str) -> Tensor:
    """Return the average precision of precision-recall curves.

    Args:
        recall: (K, T) in [0, 1], not decreasing along the first dimension.
        precision: (K, T) in [0, 1], at those recalls.
        rule: One of `RULES`.

    Returns:
        average precision (T,) in [0, 1].
    """
    if not len(recall):
        return torch.zeros(recall.shape[1], dtype=recall.dtype)
    envelope = precision.flip(0).cummax(0).values.flip(0)  # the best precision at this recall or a larger one
    if rule == "voc":
        steps = torch.diff(recall, dim=0, prepend=torch.zeros_like(recall[:1]))
        return (steps * envelope).sum(0)
    count = 11 if rule == "voc07" else 101
    samples = torch.arange(count, dtype=recall.dtype) * (1 / (count - 1))  # the very numbers of the public tools
    index = torch.searchsorted(recall.T.contiguous(), samples.expand(recall.shape[1], -1).contiguous())  # (T, count)
    padded = torch.cat([envelope, torch.zeros_like(envelope[:1])])
    return padded.T.gather(1, index).mean(1)


def confusion_matrix(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    num_classes: int,
    score_threshold: float,
    iou_threshold: float = 0.5,
) -> Tensor:
    """Count which class is detected as which, with one more row and column for background.

    Detections, the highest-scoring first, each take the free box that they overlap most, whatever its class. A
    difficult box and the detection that takes it are not counted, nor are detections in a crowd that take no box.

    Args:
        detections: One for each image.
        truths: The ground truth of the same images.
        num_classes: C.
        score_threshold: Detections with a lower score are left out, in [0, 1].
        iou_threshold: The smallest IoU of a detection with its box, in [0, 1].

    Returns:
        counts int64 (C + 1, C + 1): ground truth by row, detections by column, background last.
    """
    table = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for detected, true in zip(detections, truths, strict=True):
        boxes_taken = match_any_class(detected, true, score_threshold, iou_threshold)
        is_missed = ~true.is_ignored
        for label, box in zip(detected.labels.tolist(), boxes_taken.tolist(), strict=True):
            if box == BACKGROUND:
                table[num_classes, label] += 1
            elif box != IGNORED:
                is_missed[box] = False
                table[true.labels[box], label] += 1
        for label in true.labels[is_missed].tolist():
            table[label, num_classes] += 1
    return table


def match_any_class(
    detected: Detections, true: GroundTruth, score_threshold: float, iou_threshold: float = 0.5
) -> Tensor:
    """Match the detections of an image with its boxes, as `confusion_matrix` counts them.

    A detection gets the same box at every threshold up to its score.

    Args:
        detected: The detections.
        true: The ground truth.
        score_threshold: Detections with a lower score are ignored, in [0, 1].
        iou_threshold: The smallest IoU of a detection with its box, in [0, 1].

    Returns:
        int64 (N,): the box that each detection takes; BACKGROUND if it takes none, IGNORED if it is not counted.
    """
    taken = torch.full((len(detected.labels),), IGNORED)
    is_free = ~true.is_crowd
    in_crowd = _covered_by_crowd(detected, true) >= iou_threshold
    order = torch.argsort(detected.scores, descending=True, stable=True)
    iou = boxes.iou(detected.boxes_xyxy.double(), true.boxes_xyxy.double())
    for k in order[detected.scores[order] >= score_threshold].tolist():
        row = torch.where(is_free, iou[k], -1.0)
        best = int(row.argmax()) if len(row) else -1
        if best >= 0 and row[best] >= iou_threshold:
            is_free[best] = False
            taken[k] = IGNORED if true.difficult[best] else best
        elif not in_crowd[k]:
            taken[k] = BACKGROUND
    return taken


def _covered_by_crowd(detected: Detections, true: GroundTruth) -> Tensor:
    """Return the largest fraction of each detection of an image that one crowd covers (N,)."""
    crowds_xyxy = true.boxes_xyxy[true.is_crowd].double()
    coverage = boxes.paired_coverage(detected.boxes_xyxy.double()[:, None], crowds_xyxy[None])
    return torch.cat([torch.zeros(len(coverage), 1).double(), coverage], 1).amax(1)


def recall_by_size(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], score_threshold: float, iou_threshold: float = 0.5
) -> dict[str, float]:
    """Return the recall of small, medium and large objects. One detection may find several objects.

    Args:
        detections: One for each image.
        truths: The ground truth of the same images; difficult boxes and crowds are left out.
        score_threshold: Detections with a lower score are left out, in [0, 1].
        iou_threshold: The smallest IoU of a detection of the same class, in [0, 1].

    Returns:
        recall in [0, 1] for each of `AREA_RANGES`, nan where there is no such object.
    """
    areas, hits = [], []
    for detected, true in zip(detections, truths, strict=True):
        keep = detected.scores >= score_threshold
        iou = boxes.iou(true.boxes_xyxy.double(), detected.boxes_xyxy[keep].double())
        same_class = true.labels[:, None] == detected.labels[keep][None]
        is_hit = ((iou >= iou_threshold) & same_class).any(1)
        areas.append(boxes.area(true.boxes_xyxy)[~true.is_ignored])
        hits.append(is_hit[~true.is_ignored])
    area = torch.cat(areas) if areas else torch.empty(0)
    is_hit = torch.cat(hits).double() if hits else torch.empty(0).double()
    in_range = {name: (area >= low) & (area < high) for name, (low, high) in AREA_RANGES.items()}
    return {name: float(is_hit[mask].mean()) for name, mask in in_range.items()}
