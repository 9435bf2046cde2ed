"""Average precision: by hand, against a slow twin and against the public implementations; confusion, sizes."""

import math

import numpy as np
import pytest
import torch

from cvlab import _compat
from cvlab.ops import average_precision as ap
from cvlab.ops.average_precision import Detections, GroundTruth


def picture(generator, num_classes, ties, difficult):
    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    count = int(uniform(1) * 9)
    low = uniform(count, 2) * 300
    ground_truth = torch.cat([low, low + 60 + uniform(count, 2) * 100], 1)
    labels = (uniform(count) * num_classes).long()
    num_found = int(uniform(1) * 14)
    if count:
        which = (uniform(num_found) * count).long()
        found = ground_truth[which] + (uniform(num_found, 4) - 0.5) * 40
        named = torch.where(uniform(num_found) < 0.8, labels[which], (uniform(num_found) * num_classes).long())
    else:
        low = uniform(num_found, 2) * 300
        found, named = torch.cat([low, low + 50], 1), (uniform(num_found) * num_classes).long()
    scores = uniform(num_found)
    scores = (scores * 5).round() / 5 if ties else scores
    hard = uniform(count) < 0.25 if difficult else torch.zeros(count, dtype=torch.bool)
    return Detections(found, scores, named), GroundTruth(ground_truth, labels, hard)


def pictures(seed, count=25, num_classes=4, ties=False, difficult=False):
    generator = torch.Generator().manual_seed(seed)
    pairs = [picture(generator, num_classes, ties, difficult) for _ in range(count)]
    return [found for found, _ in pairs], [ground_truth for _, ground_truth in pairs]


def overlap(a, b):
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(high, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_outcomes(found, ground_truth, label, threshold, rule):
    """The states of one picture's detections of a class, the surest first: True, False, or None where it counts not."""
    order = sorted(range(len(found.labels)), key=lambda k: -float(found.scores[k]))
    order = [k for k in order if found.labels[k] == label]
    own = [m for m in range(len(ground_truth.labels)) if ground_truth.labels[m] == label]
    used, states = set(), []
    for k in order:
        overlaps = {m: overlap(found.boxes_xyxy[k].tolist(), ground_truth.boxes_xyxy[m].tolist()) for m in own}
        if rule == "coco":
            free = [m for m in own if m not in used and not ground_truth.difficult[m] and overlaps[m] >= threshold]
            ignored = [m for m in own if ground_truth.difficult[m] and overlaps[m] >= threshold]
            best = max(free, key=lambda m: (overlaps[m], m), default=None)
            states.append((float(found.scores[k]), True if best is not None else None if ignored else False))
            used |= {best} if best is not None else set()
        else:
            best = max(own, key=lambda m: overlaps[m], default=None)
            if best is None or overlaps[best] < threshold:
                states.append((float(found.scores[k]), False))
            elif ground_truth.difficult[best]:
                states.append((float(found.scores[k]), None))
            else:
                states.append((float(found.scores[k]), best not in used))
                used.add(best)
    return states


def slow_ap(detections, truths, label, threshold, rule):
    states = [s for d, t in zip(detections, truths, strict=True) for s in slow_outcomes(d, t, label, threshold, rule)]
    states.sort(key=lambda s: -s[0])
    total = sum(int(((t.labels == label) & ~t.difficult).sum()) for t in truths)
    if not total:
        return math.nan
    right, wrong, curve = 0, 0, []
    for _, state in states:
        right, wrong = right + (state is True), wrong + (state is False)
        curve.append((right / total, right / max(right + wrong, 1)))
    if rule == "voc":
        area, before = 0.0, 0.0
        for k, (recall, _) in enumerate(curve):
            area += (recall - before) * max(p for _, p in curve[k:])
            before = recall
        return area
    steps = 10 if rule == "voc07" else 100
    return sum(max((p for r, p in curve if r >= k * (1 / steps)), default=0.0) for k in range(steps + 1)) / (steps + 1)


@pytest.mark.parametrize("rule", ap.RULES)
@pytest.mark.parametrize(
    ("seed", "ties", "difficult"), [(0, False, False), (1, True, False), (2, False, True), (3, True, True)]
)
def test_matches_the_slow_implementation(rule, seed, ties, difficult):
    found, ground_truth = pictures(seed, ties=ties, difficult=difficult)
    metrics = ap.evaluate(found, ground_truth, 5, rule)  # nothing is of the fifth class
    both = ap.evaluate(found, ground_truth, 5, rule, (0.5, 0.75)).ap50_95 * 2
    for label in range(5):
        first, second = (slow_ap(found, ground_truth, label, threshold, rule) for threshold in (0.5, 0.75))
        assert float(metrics.ap50[label]) == pytest.approx(first, abs=1e-6, nan_ok=True)
        assert float(both[label]) == pytest.approx(first + second, abs=1e-6, nan_ok=True)
    assert metrics.map_rule == rule
    assert math.isnan(float(metrics.ap50[4]))
    assert int(metrics.num_truths[4]) == 0
    assert metrics.map50 == pytest.approx(float(metrics.ap50[:4].mean()))


@pytest.mark.parametrize("seed", range(3))
def test_matches_torchmetrics_and_faster_coco_eval(seed):
    _compat.torchvision()  # torchmetrics imports it
    detection = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("faster_coco_eval")
    found, ground_truth = pictures(seed, 40, ties=seed == 1)
    recalls = np.linspace(0, 1, 101).tolist()  # COCO's own; torchmetrics' default rounds them to float32
    metric = detection.MeanAveragePrecision(backend="faster_coco_eval", rec_thresholds=recalls)
    metric.update(
        [{"boxes": d.boxes_xyxy, "scores": d.scores, "labels": d.labels} for d in found],
        [{"boxes": t.boxes_xyxy, "labels": t.labels} for t in ground_truth],
    )
    expected = metric.compute()
    metrics = ap.evaluate(found, ground_truth, 4, "coco")
    assert metrics.map50 == pytest.approx(float(expected["map_50"]), abs=1e-4)
    assert metrics.map50_95 == pytest.approx(float(expected["map"]), abs=1e-4)


def to_coco(detections, truths):
    """The same as COCO's JSON; difficult ones get an area that no range holds, which has them ignored."""
    annotations, results = [], []
    for image, (found, ground_truth) in enumerate(zip(detections, truths, strict=True), 1):
        for box, label, hard in zip(
            ground_truth.boxes_xyxy.tolist(), ground_truth.labels.tolist(), ground_truth.difficult, strict=True
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            area = 1e12 if hard else bbox[2] * bbox[3]
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": label + 1})
            annotations[-1] |= {"bbox": bbox, "area": area, "iscrowd": 0}
        for box, label, score in zip(
            found.boxes_xyxy.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": label + 1, "bbox": bbox, "score": score})
    images = [{"id": k + 1} for k in range(len(truths))]
    categories = [{"id": k + 1, "name": str(k)} for k in range(4)]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}, results


@pytest.mark.parametrize("seed", range(3))
def test_each_class_and_threshold_of_faster_coco_eval_with_difficult_ones(seed):
    """Each difficult box is found once at most: COCO ignores the first find of one, here every one is."""
    oracle = pytest.importorskip("faster_coco_eval")
    generator = torch.Generator().manual_seed(seed)
    found, ground_truth = [], []
    for _ in range(30):
        count = int(torch.randint(0, 10, (1,), generator=generator))
        low = torch.arange(count)[:, None] * torch.tensor([100.0, 0])
        boxes = torch.cat([low, low + 50 + 40 * torch.rand(count, 2, generator=generator)], 1)
        labels = torch.randint(0, 4, (count,), generator=generator)
        near = boxes + 12 * (torch.rand(count, 4, generator=generator) - 0.5)
        scores = (torch.rand(count, generator=generator) * 20).round() / 20
        named = torch.where(torch.rand(count, generator=generator) < 0.8, labels, labels.flip(0))
        found.append(Detections(near, scores, named))
        ground_truth.append(GroundTruth(boxes, labels, torch.rand(count, generator=generator) < 0.3))
    truth, results = to_coco(found, ground_truth)
    known = oracle.COCO(truth)
    judge = oracle.COCOeval_faster(known, known.loadRes(results), "bbox", print_function=lambda *_: None)
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    judge.params.maxDets = [100]
    judge.evaluate()
    judge.accumulate()
    precision = torch.from_numpy(np.asarray(judge.eval["precision"]))[..., 0, 0]  # (T, 101, C)
    assert bool((precision >= 0).all())
    assert any(bool(t.difficult.any()) for t in ground_truth)
    metrics = ap.evaluate(found, ground_truth, 4, "coco")
    torch.testing.assert_close(metrics.ap50, precision[0].mean(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(metrics.ap50_95, precision.mean((0, 1)), atol=1e-9, rtol=0)


def crowded_picture(generator, num_classes):
    """Objects and crowds (30 %) of any place and size, with detections near objects and inside crowds."""

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    count = int(uniform(1) * 9)
    low = uniform(count, 2) * 250
    true = torch.cat([low, low + 30 + uniform(count, 2) * 200], 1)
    labels = (uniform(count) * num_classes).long()
    crowd = uniform(count) < 0.3
    near, inside = torch.empty(0, 4), torch.empty(0, 4)
    near_labels = inside_labels = torch.empty(0, dtype=torch.int64)
    if count:
        picked = (uniform(int(uniform(1) * 10)) * count).long()
        near, near_labels = true[picked] + (uniform(len(picked), 4) - 0.5) * 24, labels[picked]
        picked = (uniform(int(uniform(1) * 10)) * count).long()
        sides = (true[picked, 2:] - true[picked, :2]) * 0.4
        corner = true[picked, :2] + sides * uniform(len(picked), 2) * 2
        inside, inside_labels = torch.cat([corner, corner + sides], 1), labels[picked]
    stray = torch.cat([uniform(3, 2) * 300, 310 + uniform(3, 2) * 40], 1)
    boxes = torch.cat([near, inside, stray])
    scores = (uniform(len(boxes)) * 30).round() / 30
    named = torch.cat([near_labels, inside_labels, (uniform(3) * num_classes).long()])
    return Detections(boxes, scores, named), GroundTruth(true, labels, crowd, crowd)


def crowds_to_coco(detections, truths):
    """The same pictures as COCO's JSON, in which the crowds have `iscrowd`."""
    content, results = to_coco(detections, truths)
    flags = torch.cat([t.is_crowd for t in truths]).tolist()
    for annotation, flag in zip(content["annotations"], flags, strict=True):
        annotation |= {"iscrowd": int(flag), "area": annotation["bbox"][2] * annotation["bbox"][3]}
    return content, results


@pytest.mark.parametrize("seed", range(8))
def test_crowds_equal_an_independent_evaluation_exactly(seed):
    oracle = pytest.importorskip("faster_coco_eval")
    generator = torch.Generator().manual_seed(seed)
    pairs = [crowded_picture(generator, 4) for _ in range(30)]
    detections, truths = [list(side) for side in zip(*pairs, strict=True)]
    content, results = crowds_to_coco(detections, truths)
    assert 0.1 < sum(a["iscrowd"] for a in content["annotations"]) / len(content["annotations"]) < 0.5
    known = oracle.COCO(content)
    judge = oracle.COCOeval_faster(known, known.loadRes(results), "bbox", print_function=lambda *_: None)
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    judge.params.maxDets = [100]
    judge.evaluate()
    judge.accumulate()
    precision = torch.from_numpy(np.asarray(judge.eval["precision"]))[..., 0, 0]  # (T, 101, C)
    metrics = ap.evaluate(detections, truths, 4, "coco")
    torch.testing.assert_close(metrics.ap50, precision[0].mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(metrics.ap50_95, precision.mean((0, 1)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", ap.RULES)
def test_detections_inside_a_crowd_are_ignored(rule):
    """One object is detected; the crowd's four detections, of higher scores, are neither right nor wrong."""
    inside = [[100 + 20 * k, 100, 115 + 20 * k, 115] for k in range(4)]
    detections = one([*inside, A], [0.9, 0.8, 0.7, 0.6, 0.5])
    truth = one([[100, 100, 200, 200], A])
    crowd = GroundTruth(truth.boxes_xyxy, truth.labels, truth.difficult, torch.tensor([True, False]))
    metrics = ap.evaluate([detections], [crowd], 1, rule)
    assert metrics.map50 == pytest.approx(1)
    assert metrics.map50_95 == pytest.approx(1)
    assert int(metrics.num_truths[0]) == 1
    assert ap.confusion_matrix([detections], [crowd], 1, 0.1).tolist() == [[1, 0], [0, 0]]
    assert ap.recall_by_size([detections], [crowd], 0.1)["small"] == 1
    beside = one([[190, 100, 220, 115], A], [0.9, 0.5])  # a third of it is inside
    assert ap.evaluate([beside], [crowd], 1, rule).map50 == pytest.approx(0.5, abs=0.01)
    assert ap.confusion_matrix([beside], [crowd], 1, 0.1).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("rule", ap.RULES)
def test_an_object_in_front_of_a_crowd_is_matched(rule):
    truth = one([A, [0, 0, 300, 300], B])
    crowd = GroundTruth(truth.boxes_xyxy, truth.labels, truth.difficult, torch.tensor([False, True, False]))
    metrics = ap.evaluate([one([[0, 0, 9, 10], B], [0.9, 0.8])], [crowd], 1, rule)
    assert metrics.map50 == pytest.approx(1)


def test_thresholds_are_those_of_pycocotools():
    assert np.linspace(0.5, 0.95, 10).tolist() == list(ap.IOU_THRESHOLDS)


@pytest.mark.parametrize("rule", ap.RULES)
def test_pictures_of_very_different_sizes(rule, monkeypatch):
    """Groups are padded and cut into parts: the result does not depend on which lie together."""
    generator = torch.Generator().manual_seed(4)
    crowded = [picture(generator, 1, True, True) for _ in range(12)]
    found, ground_truth = [list(side) for side in zip(*crowded, strict=True)]
    many = torch.cat([found[k].boxes_xyxy for k in range(12)])
    found[3] = Detections(many, torch.linspace(1, 0, len(many)), torch.zeros(len(many)).long())
    ground_truth[5] = GroundTruth(many + 3, torch.zeros(len(many)).long(), torch.arange(len(many)) % 5 == 0)
    metrics = ap.evaluate(found, ground_truth, 1, rule)
    assert metrics.map50 == pytest.approx(slow_ap(found, ground_truth, 0, 0.5, rule), abs=1e-6)
    monkeypatch.setattr(ap, "MAX_CHUNK_ELEMENTS", 1)
    assert ap.evaluate(found, ground_truth, 1, rule).map50_95 == metrics.map50_95


def one(boxes, scores=None, difficult=None):
    boxes_xyxy = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    labels = torch.zeros(len(boxes_xyxy), dtype=torch.int64)
    if scores is not None:
        return Detections(boxes_xyxy, torch.tensor(scores), labels)
    return GroundTruth(boxes_xyxy, labels, torch.tensor(difficult or [False] * len(boxes_xyxy)).bool())


A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]


class TestByHand:
    def test_eleven_points(self):
        """Right, wrong, right of two boxes: precision 1 up to recall 0.5, then 2/3."""
        found, ground_truth = one([A, C, B], [0.9, 0.8, 0.7]), one([A, B])
        assert ap.evaluate([found], [ground_truth], 1, "voc07").map50 == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
        assert ap.evaluate([found], [ground_truth], 1, "voc").map50 == pytest.approx(0.5 + 0.5 * 2 / 3)
        assert ap.evaluate([found], [ground_truth], 1, "coco").map50 == pytest.approx((51 + 50 * 2 / 3) / 101)

    def test_a_second_find_of_the_same_box_is_wrong(self):
        found = one([A, A, B], [0.9, 0.8, 0.7])
        assert ap.evaluate([found], [one([A, B])], 1, "voc").map50 == pytest.approx(0.5 + 0.5 * 2 / 3)

    def test_difficult_ones_count_neither_way(self):
        found, ground_truth = one([A, B], [0.9, 0.8]), one([A, B], difficult=[True, False])
        for rule in ap.RULES:
            metrics = ap.evaluate([found], [ground_truth], 1, rule)
            assert metrics.map50 == pytest.approx(1)
            assert int(metrics.num_truths[0]) == 1

    def test_voc_does_not_look_for_a_second_best_box_but_coco_does(self):
        first, near = [0, 0, 10, 10], [2, 0, 12, 10]
        found = one([first, [0.5, 0, 10.5, 10]], [0.9, 0.8])  # both overlap the first most
        ground_truth = one([first, near])
        assert ap.evaluate([found], [ground_truth], 1, "voc").map50 == pytest.approx(0.5)
        assert ap.evaluate([found], [ground_truth], 1, "coco").map50 == pytest.approx(1)

    def test_of_equal_overlaps_coco_takes_the_last(self):
        ground_truth = one([[0, 0, 10, 10], [4, 0, 14, 10]])
        found = one([[2, 0, 12, 10], [5, 0, 15, 10]], [0.9, 0.8])  # the first lies in the middle of both
        assert ap.evaluate([found], [ground_truth], 1, "coco").map50 == pytest.approx(51 / 101)
        assert ap.evaluate([found], [ground_truth], 1, "voc").map50 == pytest.approx(1)

    @pytest.mark.parametrize("rule", ap.RULES)
    def test_an_overlap_of_exactly_one_half_is_enough(self, rule):
        metrics = ap.evaluate([one([[0, 0, 5, 10]], [0.9])], [one([[0, 0, 10, 10]])], 1, rule)
        assert metrics.map50 == pytest.approx(1)
        assert metrics.map50_95 == pytest.approx(0.1)

    def test_nothing_found_and_nothing_there(self):
        for rule in ap.RULES:
            assert ap.evaluate([one([], [])], [one([A])], 1, rule).map50 == 0
            assert math.isnan(ap.evaluate([one([A], [0.5])], [one([])], 1, rule).map50)
            assert math.isnan(ap.evaluate([], [], 1, rule).map50)

    def test_coco_counts_a_hundred_of_a_picture(self):
        wrong = [[100 + k, 0, 101 + k, 1] for k in range(100)]
        found = one([*wrong, A], [*(0.9 - 0.001 * k for k in range(100)), 0.5])
        assert ap.evaluate([found], [one([A])], 1, "coco").map50 == 0
        assert ap.evaluate([found], [one([A])], 1, "voc").map50 == pytest.approx(1 / 101)

    def test_curves(self):
        metrics = ap.evaluate([one([A, C, B], [0.9, 0.8, 0.7])], [one([A, B])], 1, "voc")
        assert metrics.recalls[0].tolist() == [0.5, 0.5, 1.0]
        assert metrics.precisions[0].tolist() == pytest.approx([1, 0.5, 2 / 3])


def test_confusion():
    found = Detections(torch.tensor([A, B, C]).float(), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]))
    ground_truth = GroundTruth(
        torch.tensor([A, B, [0, 50, 10, 60]]).float(), torch.tensor([0, 1, 1]), torch.zeros(3).bool()
    )
    table = ap.confusion_matrix([found], [ground_truth], 2, 0.5)
    assert table.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert ap.confusion_matrix([found], [ground_truth], 2, 0.85).tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert ap.confusion_matrix([], [], 2, 0.5).tolist() == [[0] * 3] * 3
    nothing = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0).long())
    assert ap.confusion_matrix([nothing], [ground_truth], 2, 0.5).tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]
    assert ap.confusion_matrix([found], [one([])], 2, 0.5).tolist() == [[0, 0, 0], [0, 0, 0], [2, 1, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_confusion_is_the_loop(seed):
    found, ground_truth = pictures(seed, ties=True, difficult=True)
    table = [[0] * 5 for _ in range(5)]
    for f, t in zip(found, ground_truth, strict=True):
        free = set(range(len(t.labels)))
        for k in sorted(range(len(f.labels)), key=lambda k: -float(f.scores[k])):
            if float(f.scores[k]) < 0.4:
                continue
            overlaps = {m: overlap(f.boxes_xyxy[k].tolist(), t.boxes_xyxy[m].tolist()) for m in sorted(free)}
            best = max(overlaps, key=lambda m: overlaps[m], default=None)
            if best is None or overlaps[best] < 0.45:
                table[4][f.labels[k]] += 1
                continue
            free.remove(best)
            if not t.difficult[best]:
                table[t.labels[best]][f.labels[k]] += 1
        for m in free:
            table[t.labels[m]][4] += not t.difficult[m]
    mine = ap.confusion_matrix(found, ground_truth, 4, score_threshold=0.4, iou_threshold=0.45)
    assert mine.tolist() == table
    assert mine.dtype == torch.int64
    assert int(mine[:4].sum()) == sum(int((~t.difficult).sum()) for t in ground_truth)


def test_a_label_that_is_no_class():
    with pytest.raises(AssertionError, match="no class"):
        ap.evaluate([Detections(torch.zeros(1, 4), torch.ones(1), torch.tensor([1]))], [one([A])], 1, "voc")


def test_boxes_without_area_are_never_right():
    point = [5, 5, 5, 5]
    for rule in ap.RULES:
        assert ap.evaluate([one([point], [0.9])], [one([point])], 1, rule).map50 == 0


def test_recall_by_size():
    small, large = [0, 0, 10, 10], [0, 0, 200, 200]
    ground_truth = one([small, large])
    found = one([large], [0.9])
    result = ap.recall_by_size([found], [ground_truth], 0.5)
    assert result["small"] == 0
    assert result["large"] == 1
    assert math.isnan(result["medium"])
    assert all(math.isnan(share) for share in ap.recall_by_size([], [], 0.5).values())


def test_recall_by_size_is_of_a_class_above_the_floor_and_without_difficult_ones():
    sides = [31, 32, 95, 96, 31]  # small ends below 32^2, medium below 96^2
    ground_truth = one(
        [[200 * k, 0, 200 * k + side, side] for k, side in enumerate(sides)], difficult=[False] * 4 + [True]
    )
    found = Detections(ground_truth.boxes_xyxy, torch.tensor([0.9, 0.9, 0.4, 0.9, 0.0]), torch.tensor([0, 0, 0, 1, 0]))
    assert ap.recall_by_size([found], [ground_truth], 0.5) == {"small": 1, "medium": 0.5, "large": 0}
    assert ap.recall_by_size([found], [ground_truth], 0.4) == {"small": 1, "medium": 1, "large": 0}
