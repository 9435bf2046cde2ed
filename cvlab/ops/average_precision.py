"""How good the detections of a data set are: average precision by the rules of PASCAL VOC and of COCO.

Papers: Everingham et al., 2010, "The PASCAL VOC challenge", section 4.2 (voc07: mean precision at 11 recalls; voc: area
under the curve, since 2010); Lin et al., 2014, "Microsoft COCO" (coco: 101 recalls, at most 100 detections of a class
in a picture). Differs from the usual loops: all pictures and classes are matched at once, detection rank by rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.ops import boxes

RULES = ("voc07", "voc", "coco")
IOU_THRESHOLDS = tuple(
    0.5 + k * ((0.95 - 0.5) / 9) for k in range(10)
)  # of IoU, to the last bit as pycocotools has them
COCO_MAX_DETECTIONS = 100
AREA_RANGES = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, float("inf")),
}  # areas, of COCO
MAX_CHUNK_ELEMENTS = 500_000  # numbers in a tensor of overlaps


@dataclass(frozen=True)
class Detections:
    """What is found in a picture: boxes_xyxy (N, 4), scores (N,) in [0, 1], labels int64 (N,)."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class GroundTruth:
    """What is there: boxes_xyxy (M, 4), labels int64 (M,), difficult bool (M,): those count neither way."""

    boxes_xyxy: Tensor
    labels: Tensor
    difficult: Tensor


@dataclass(frozen=True)
class DetectionMetrics:
    """The verdict over a set by one of `RULES`.

    By class: average precision (C,) float64 at IoU 0.5, and its mean over all thresholds, in [0, 1], nan without any
    truth; the means over classes leave those out. `recalls` and `precisions` are the curves at IoU 0.5, a point for
    each detection by falling score; `num_truths`, int64 (C,), counts those not difficult.
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
class _Flat:
    """The boxes of all pictures one after the other, sorted by picture and class, and where each such group starts."""

    boxes_xyxy: Tensor
    keys: Tensor  # picture * num_classes + class, of each box
    order: Tensor  # where each box was before it was sorted
    groups: Tensor  # the keys that there are
    starts: Tensor
    counts: Tensor


def _flat(boxes_xyxy: Tensor, keys: Tensor, order: Tensor) -> _Flat:
    groups, counts = torch.unique_consecutive(keys[order], return_counts=True)
    return _Flat(boxes_xyxy[order], keys[order], order, groups, counts.cumsum(0) - counts, counts)


def _keys(parts: Sequence[Tensor], num_classes: int) -> Tensor:
    """Return the key of each label of all pictures."""
    pictures = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]).long())
    labels = torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.int64)
    assert bool(((labels >= 0) & (labels < num_classes)).all()), "a label that is no class"
    return pictures * num_classes + labels


def evaluate(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    num_classes: int,
    rule: str = "voc",
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> DetectionMetrics:
    """Judge the detections of pictures, in the order of their truths, by one of `RULES`.

    The first threshold of IoU must be 0.5. Of equally sure detections the first one counts first.
    """
    assert rule in RULES
    assert len(detections) == len(truths)
    assert thresholds[0] == 0.5
    found_keys = _keys([d.labels for d in detections], num_classes)
    scores = torch.cat([d.scores for d in detections]).double() if detections else torch.empty(0).double()
    by_score = torch.argsort(scores, descending=True, stable=True)
    found = _flat(
        torch.cat([d.boxes_xyxy for d in detections]).double() if detections else torch.empty(0, 4).double(),
        found_keys,
        by_score[torch.argsort(found_keys[by_score], stable=True)],
    )
    true_keys = _keys([t.labels for t in truths], num_classes)
    true = _flat(
        torch.cat([t.boxes_xyxy for t in truths]).double() if truths else torch.empty(0, 4).double(),
        true_keys,
        torch.argsort(true_keys, stable=True),
    )
    is_difficult = torch.cat([t.difficult for t in truths]) if truths else torch.empty(0, dtype=torch.bool)
    state = _match(found, true, is_difficult[true.order], torch.tensor(thresholds).double(), rule == "coco")
    rank = torch.arange(len(found.keys)) - torch.repeat_interleave(found.starts, found.counts)
    counted = rank < COCO_MAX_DETECTIONS if rule == "coco" else torch.ones_like(rank, dtype=torch.bool)
    true_labels = true.keys % num_classes if num_classes else true.keys
    num_truths = torch.bincount(true_labels[~is_difficult[true.order]], minlength=num_classes)
    return _judge(found, scores, state, counted, num_truths, rule)


def _match(found: _Flat, true: _Flat, is_difficult: Tensor, thresholds: Tensor, is_coco: bool) -> Tensor:
    """Return for each detection and threshold (N, T): 1 right, 0 wrong, -1 counts neither way; in the sorted order."""
    state = torch.zeros(len(found.keys), len(thresholds), dtype=torch.int8)
    place = torch.searchsorted(true.groups, found.groups)
    shared = place < len(true.groups)
    shared[shared.clone()] = true.groups[place[shared]] == found.groups[shared]
    first = shared.nonzero()[:, 0]
    pairs = torch.stack([first, place[first]], 1)  # a group of detections and its group of truths
    sizes = torch.stack([found.counts[pairs[:, 0]], true.counts[pairs[:, 1]]], 1)
    # Groups that are alike in both sizes, to a factor of two, go together: padding makes them at most 4 times larger.
    alike = sizes.double().log2().ceil() @ torch.tensor([64.0, 1.0]).double()
    order = torch.argsort(alike)
    for bucket in order.split(torch.unique_consecutive(alike[order], return_counts=True)[1].tolist()):
        most = sizes[bucket].amax(0).tolist()
        for part in bucket.split(max(1, MAX_CHUNK_ELEMENTS // (most[0] * most[1]))):
            _match_groups(state, found, true, is_difficult, pairs[part], most, thresholds, is_coco)
    return state


def _match_groups(
    state: Tensor,
    found: _Flat,
    true: _Flat,
    is_difficult: Tensor,
    pairs: Tensor,
    most: list[int],
    thresholds: Tensor,
    is_coco: bool,
) -> None:
    """Match some groups, padded to `most` detections and truths, and write the result into `state`."""
    d, m = most
    rows = found.starts[pairs[:, 0], None] + torch.arange(d)
    is_found = torch.arange(d) < found.counts[pairs[:, 0], None]
    columns = true.starts[pairs[:, 1], None] + torch.arange(m)
    is_true = torch.arange(m) < true.counts[pairs[:, 1], None]
    rows, columns = rows.clamp(max=len(found.keys) - 1), columns.clamp(max=len(true.keys) - 1)
    overlap = boxes.paired_iou(found.boxes_xyxy[rows][:, :, None], true.boxes_xyxy[columns][:, None])  # (G, D, M)
    overlap[~is_true[:, None].expand_as(overlap)] = -1
    hard = is_difficult[columns] & is_true  # (G, M)
    judge = _coco if is_coco else _voc
    verdict = judge(overlap, hard, thresholds)  # (G, D, T)
    state[rows[is_found]] = verdict[is_found]


def _voc(overlap: Tensor, hard: Tensor, thresholds: Tensor) -> Tensor:
    """Judge each detection by the truth that it overlaps most; of several only the surest is right."""
    best, which = overlap.max(2)  # (G, D)
    enough = best[..., None] >= thresholds  # (G, D, T)
    neither = enough & hard.gather(1, which)[..., None]
    groups, d, t = enough.shape
    box, rank = which[..., None].expand_as(enough), torch.arange(d)[:, None].expand_as(enough)
    first = torch.full((groups, overlap.shape[2], t), d)  # the surest detection that claims a box
    first = first.scatter_reduce(1, box, torch.where(enough, rank, d), "amin")  # (G, M, T)
    right = enough & (first.gather(1, box) == rank)
    return torch.where(neither, -1, right.to(torch.int8)).to(torch.int8)


def _coco(overlap: Tensor, hard: Tensor, thresholds: Tensor) -> Tensor:
    """Let each detection, the surest first, take the best truth that is still free; difficult ones last, and again."""
    groups, d, m = overlap.shape
    free = torch.ones(groups, len(thresholds), m, dtype=torch.bool)
    bound = thresholds.clamp(max=1 - 1e-10)[None, :, None]
    verdicts = torch.zeros(groups, d, len(thresholds), dtype=torch.int8)
    easy = ~hard[:, None]
    # Of equal overlaps the last one wins, as in pycocotools.
    bonus = torch.arange(m, dtype=overlap.dtype) * 1e-13
    for k in range(d):
        here = overlap[:, k, None]  # (G, 1, M)
        fits = here >= bound
        can = fits & free & easy  # (G, T, M)
        value, which = torch.where(can, here + bonus, -1.0).max(2)
        takes = value >= 0
        free.scatter_(2, which[..., None], free.gather(2, which[..., None]) & ~takes[..., None])
        neither = (fits & hard[:, None]).any(2) & ~takes
        verdicts[:, k] = torch.where(takes, 1, torch.where(neither, -1, 0)).to(torch.int8)
    return verdicts


def _judge(
    found: _Flat, scores: Tensor, state: Tensor, counted: Tensor, num_truths: Tensor, rule: str
) -> DetectionMetrics:
    num_classes = len(num_truths)
    labels = found.keys % max(num_classes, 1)
    # By falling score over all pictures; of equal scores the earlier picture, then the earlier detection, comes first.
    by_score = torch.argsort(scores[found.order], descending=True, stable=True)
    by_class = by_score[torch.argsort(labels[by_score], stable=True)]
    by_class = by_class[counted[by_class]]
    ends = torch.bincount(labels[by_class], minlength=num_classes).cumsum(0).tolist()
    ap = torch.full((num_classes, state.shape[1]), torch.nan, dtype=torch.float64)
    recalls, precisions = [], []
    for label, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own = state[by_class[start:end]]  # (K, T)
        right = (own == 1).cumsum(0).double()
        wrong = (own == 0).cumsum(0).double()
        total = int(num_truths[label])
        recall = right / max(total, 1)
        precision = right / (right + wrong).clamp(min=1)
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
    """Return the average precision (T,) of curves (K, T): recalls that never fall, and the precisions at them."""
    if not len(recall):
        return torch.zeros(recall.shape[1], dtype=recall.dtype)
    envelope = precision.flip(0).cummax(0).values.flip(0)  # the best precision at this recall or a larger one
    if rule == "voc":
        steps = torch.diff(recall, dim=0, prepend=torch.zeros_like(recall[:1]))
        return (steps * envelope).sum(0)
    count = 11 if rule == "voc07" else 101
    at = torch.arange(count, dtype=recall.dtype) * (1 / (count - 1))  # the very numbers of the public tools
    places = torch.searchsorted(recall.T.contiguous(), at.expand(recall.shape[1], -1).contiguous())  # (T, count)
    padded = torch.cat([envelope, torch.zeros_like(envelope[:1])])
    return padded.T.gather(1, places).mean(1)


def confusion_matrix(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    num_classes: int,
    score_threshold: float,
    iou_threshold: float = 0.5,
) -> Tensor:
    """Count what is taken for what: int64 (C + 1, C + 1), truths down, detections across, nothing at the end of both.

    Detections of at least `score_threshold`, in order of score, take the free box that they overlap most, whatever
    its class. A difficult box, and the detection that takes it, are not counted.
    """
    table = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for found, true in zip(detections, truths, strict=True):
        free = torch.ones(len(true.labels), dtype=torch.bool)
        order = torch.argsort(found.scores, descending=True, stable=True)
        overlap = boxes.iou(found.boxes_xyxy.double(), true.boxes_xyxy.double())
        for k in order[found.scores[order] >= score_threshold].tolist():
            row = torch.where(free, overlap[k], -1.0)
            best = int(row.argmax()) if len(row) else -1
            if best >= 0 and row[best] >= iou_threshold:
                free[best] = False
                if not true.difficult[best]:
                    table[true.labels[best], found.labels[k]] += 1
            else:
                table[num_classes, found.labels[k]] += 1
        for label in true.labels[free & ~true.difficult].tolist():
            table[label, num_classes] += 1
    return table


def recall_by_size(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], score_threshold: float, iou_threshold: float = 0.5
) -> dict[str, float]:
    """Return the share, in [0, 1], of truths of each of `SIZES` that a detection of their class finds; nan without any.

    One detection may find several; difficult truths are left out.
    """
    areas, hits = [], []
    for found, true in zip(detections, truths, strict=True):
        sure = found.scores >= score_threshold
        overlap = boxes.iou(true.boxes_xyxy.double(), found.boxes_xyxy[sure].double())
        same = true.labels[:, None] == found.labels[sure][None]
        hit = ((overlap >= iou_threshold) & same).any(1)
        areas.append(boxes.area(true.boxes_xyxy)[~true.difficult])
        hits.append(hit[~true.difficult])
    area = torch.cat(areas) if areas else torch.empty(0)
    hit = torch.cat(hits).double() if hits else torch.empty(0).double()
    inside = {name: (area >= low) & (area < high) for name, (low, high) in AREA_RANGES.items()}
    return {name: float(hit[which].mean()) for name, which in inside.items()}
