"""Average precision against hand-computed values, a slow reference and public implementations; confusion, sizes."""

import math

import numpy as np
import pytest
import torch

from cvlab import _compat
from cvlab.ops import average_precision as ap
from cvlab.ops.average_precision import Detections, GroundTruth


def random_image(generator, num_classes, ties, difficult):
    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    count = int(uniform(1) * 9)
    low = uniform(count, 2) * 300
    ground_truth = torch.cat([low, low + 60 + uniform(count, 2) * 100], 1)
    labels = (uniform(count) * num_classes).long()
    num_detections = int(uniform(1) * 14)
    if count:
        source = (uniform(num_detections) * count).long()
        boxes = ground_truth[source] + (uniform(num_detections, 4) - 0.5) * 40
        detected_labels = torch.where(
            uniform(num_detections) < 0.8, labels[source], (uniform(num_detections) * num_classes).long()
        )
    else:
        low = uniform(num_detections, 2) * 300
        boxes, detected_labels = torch.cat([low, low + 50], 1), (uniform(num_detections) * num_classes).long()
    scores = uniform(num_detections)
    scores = (scores * 5).round() / 5 if ties else scores
    is_difficult = uniform(count) < 0.25 if difficult else torch.zeros(count, dtype=torch.bool)
    return Detections(boxes, scores, detected_labels), GroundTruth(ground_truth, labels, is_difficult)


def random_images(seed, count=25, num_classes=4, ties=False, difficult=False):
    generator = torch.Generator().manual_seed(seed)
    pairs = [random_image(generator, num_classes, ties, difficult) for _ in range(count)]
    return [detections for detections, _ in pairs], [ground_truth for _, ground_truth in pairs]


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def slow_outcomes(detections, ground_truth, label, threshold, rule):
    """Return the outcomes for one image and class, the highest scores first: True, False, or None if ignored."""
    indices = sorted(range(len(detections.labels)), key=lambda k: -float(detections.scores[k]))
    indices = [k for k in indices if detections.labels[k] == label]
    candidates = [m for m in range(len(ground_truth.labels)) if ground_truth.labels[m] == label]
    matched, outcomes = set(), []
    for k in indices:
        overlaps = {
            m: overlap(detections.boxes_xyxy[k].tolist(), ground_truth.boxes_xyxy[m].tolist()) for m in candidates
        }
        if rule == "coco":
            free = [
                m for m in candidates if m not in matched and not ground_truth.difficult[m] and overlaps[m] >= threshold
            ]
            ignored = [m for m in candidates if ground_truth.difficult[m] and overlaps[m] >= threshold]
            best = max(free, key=lambda m: (overlaps[m], m), default=None)
            outcomes.append((float(detections.scores[k]), True if best is not None else None if ignored else False))
            matched |= {best} if best is not None else set()
        else:
            best = max(candidates, key=lambda m: overlaps[m], default=None)
            if best is None or overlaps[best] < threshold:
                outcomes.append((float(detections.scores[k]), False))
            elif ground_truth.difficult[best]:
                outcomes.append((float(detections.scores[k]), None))
            else:
                outcomes.append((float(detections.scores[k]), best not in matched))
                matched.add(best)
    return outcomes


def slow_ap(detections, truths, label, threshold, rule):
    outcomes = [s for d, t in zip(detections, truths, strict=True) for s in slow_outcomes(d, t, label, threshold, rule)]
    outcomes.sort(key=lambda s: -s[0])
    total = sum(int(((t.labels == label) & ~t.difficult).sum()) for t in truths)
    if not total:
        return math.nan
    num_correct, num_wrong, curve = 0, 0, []
    for _, outcome in outcomes:
        num_correct, num_wrong = num_correct + (outcome is True), num_wrong + (outcome is False)
        curve.append((num_correct / total, num_correct / max(num_correct + num_wrong, 1)))
    if rule == "voc":
        area, previous_recall = 0.0, 0.0
        for k, (recall, _) in enumerate(curve):
            area += (recall - previous_recall) * max(p for _, p in curve[k:])
            previous_recall = recall
        return area
    steps = 10 if rule == "voc07" else 100
    return sum(max((p for r, p in curve if r >= k * (1 / steps)), default=0.0) for k in range(steps + 1)) / (steps + 1)


@pytest.mark.parametrize("rule", ap.RULES)
@pytest.mark.parametrize(
    ("seed", "ties", "difficult"), [(0, False, False), (1, True, False), (2, False, True), (3, True, True)]
)
def test_matches_the_slow_implementation(rule, seed, ties, difficult):
    detections, ground_truth = random_images(seed, ties=ties, difficult=difficult)
    metrics = ap.evaluate(detections, ground_truth, 5, rule)  # nothing is of the fifth class
    ap_sums = ap.evaluate(detections, ground_truth, 5, rule, (0.5, 0.75)).ap50_95 * 2
    for label in range(5):
        first, second = (slow_ap(detections, ground_truth, label, threshold, rule) for threshold in (0.5, 0.75))
        assert float(metrics.ap50[label]) == pytest.approx(first, abs=1e-6, nan_ok=True)
        assert float(ap_sums[label]) == pytest.approx(first + second, abs=1e-6, nan_ok=True)
    assert metrics.map_rule == rule
    assert math.isnan(float(metrics.ap50[4]))
    assert int(metrics.num_truths[4]) == 0
    assert metrics.map50 == pytest.approx(float(metrics.ap50[:4].mean()))


@pytest.mark.parametrize("seed", range(3))
def test_matches_torchmetrics_and_faster_coco_eval(seed):
    _compat.torchvision()  # torchmetrics imports it
    detection = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("faster_coco_eval")
    detections, ground_truth = random_images(seed, 40, ties=seed == 1)
    recalls = np.linspace(0, 1, 101).tolist()  # those of COCO; torchmetrics rounds its defaults to float32
    metric = detection.MeanAveragePrecision(backend="faster_coco_eval", rec_thresholds=recalls)
    metric.update(
        [{"boxes": d.boxes_xyxy, "scores": d.scores, "labels": d.labels} for d in detections],
        [{"boxes": t.boxes_xyxy, "labels": t.labels} for t in ground_truth],
    )
    expected = metric.compute()
    metrics = ap.evaluate(detections, ground_truth, 4, "coco")
    assert metrics.map50 == pytest.approx(float(expected["map_50"]), abs=1e-4)
    assert metrics.map50_95 == pytest.approx(float(expected["map"]), abs=1e-4)


def to_coco(detections, truths):
    """Convert to COCO's JSON. Difficult boxes get an area outside every range, so that they are ignored."""
    annotations, results = [], []
    for image, (image_detections, image_truth) in enumerate(zip(detections, truths, strict=True), 1):
        for box, label, is_difficult in zip(
            image_truth.boxes_xyxy.tolist(), image_truth.labels.tolist(), image_truth.difficult, strict=True
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            area = 1e12 if is_difficult else bbox[2] * bbox[3]
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": label + 1})
            annotations[-1] |= {"bbox": bbox, "area": area, "iscrowd": 0}
        for box, label, score in zip(
            image_detections.boxes_xyxy.tolist(),
            image_detections.labels.tolist(),
            image_detections.scores.tolist(),
            strict=True,
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": label + 1, "bbox": bbox, "score": score})
    images = [{"id": k + 1} for k in range(len(truths))]
    categories = [{"id": k + 1, "name": str(k)} for k in range(4)]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}, results


def coco_precision(coco_json, results):
    """Return the precision computed by faster_coco_eval for objects of all sizes, (thresholds, 101, classes)."""
    faster_coco_eval = pytest.importorskip("faster_coco_eval")
    coco_gt = faster_coco_eval.COCO(coco_json)
    coco_dt = coco_gt.loadRes(results)
    coco_eval = faster_coco_eval.COCOeval_faster(coco_gt, coco_dt, "bbox", print_function=lambda *_: None)
    coco_eval.params.areaRng, coco_eval.params.areaRngLbl = [[0, 1e10]], ["all"]
    coco_eval.params.maxDets = [100]
    coco_eval.evaluate()
    coco_eval.accumulate()
    return torch.from_numpy(np.asarray(coco_eval.eval["precision"]))[..., 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_each_class_and_threshold_matches_faster_coco_eval_with_difficult_boxes(seed):
    """Each difficult box is detected at most once: COCO ignores only the first detection of it, cvlab all of them."""
    generator = torch.Generator().manual_seed(seed)
    detections, ground_truth = [], []
    for _ in range(30):
        count = int(torch.randint(0, 10, (1,), generator=generator))
        low = torch.arange(count)[:, None] * torch.tensor([100.0, 0])
        boxes = torch.cat([low, low + 50 + 40 * torch.rand(count, 2, generator=generator)], 1)
        labels = torch.randint(0, 4, (count,), generator=generator)
        detected_boxes = boxes + 12 * (torch.rand(count, 4, generator=generator) - 0.5)
        scores = (torch.rand(count, generator=generator) * 20).round() / 20
        detected_labels = torch.where(torch.rand(count, generator=generator) < 0.8, labels, labels.flip(0))
        detections.append(Detections(detected_boxes, scores, detected_labels))
        ground_truth.append(GroundTruth(boxes, labels, torch.rand(count, generator=generator) < 0.3))
    coco_json, results = to_coco(detections, ground_truth)
    precision = coco_precision(coco_json, results)
    assert bool((precision >= 0).all())
    assert any(bool(t.difficult.any()) for t in ground_truth)
    metrics = ap.evaluate(detections, ground_truth, 4, "coco")
    torch.testing.assert_close(metrics.ap50, precision[0].mean(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(metrics.ap50_95, precision.mean((0, 1)), atol=1e-9, rtol=0)


def random_crowded_image(generator, num_classes):
    """Return random objects and crowds (30 %), with detections near objects and inside crowds."""

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    count = int(uniform(1) * 9)
    low = uniform(count, 2) * 250
    object_boxes = torch.cat([low, low + 30 + uniform(count, 2) * 200], 1)
    labels = (uniform(count) * num_classes).long()
    is_crowd = uniform(count) < 0.3
    near_boxes, inside_boxes = torch.empty(0, 4), torch.empty(0, 4)
    near_labels = inside_labels = torch.empty(0, dtype=torch.int64)
    if count:
        picked = (uniform(int(uniform(1) * 10)) * count).long()
        near_boxes, near_labels = object_boxes[picked] + (uniform(len(picked), 4) - 0.5) * 24, labels[picked]
        picked = (uniform(int(uniform(1) * 10)) * count).long()
        sides = (object_boxes[picked, 2:] - object_boxes[picked, :2]) * 0.4
        corner = object_boxes[picked, :2] + sides * uniform(len(picked), 2) * 2
        inside_boxes, inside_labels = torch.cat([corner, corner + sides], 1), labels[picked]
    random_boxes = torch.cat([uniform(3, 2) * 300, 310 + uniform(3, 2) * 40], 1)
    boxes = torch.cat([near_boxes, inside_boxes, random_boxes])
    scores = (uniform(len(boxes)) * 30).round() / 30
    detected_labels = torch.cat([near_labels, inside_labels, (uniform(3) * num_classes).long()])
    return Detections(boxes, scores, detected_labels), GroundTruth(object_boxes, labels, is_crowd, is_crowd)


def crowds_to_coco(detections, truths):
    """Convert the same images to COCO's JSON, with `iscrowd` set for crowds."""
    content, results = to_coco(detections, truths)
    flags = torch.cat([t.is_crowd for t in truths]).tolist()
    for annotation, flag in zip(content["annotations"], flags, strict=True):
        annotation |= {"iscrowd": int(flag), "area": annotation["bbox"][2] * annotation["bbox"][3]}
    return content, results


@pytest.mark.parametrize("seed", range(8))
def test_crowds_match_faster_coco_eval_exactly(seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = [random_crowded_image(generator, 4) for _ in range(30)]
    detections, truths = [list(side) for side in zip(*pairs, strict=True)]
    content, results = crowds_to_coco(detections, truths)
    assert 0.1 < sum(a["iscrowd"] for a in content["annotations"]) / len(content["annotations"]) < 0.5
    precision = coco_precision(content, results)
    metrics = ap.evaluate(detections, truths, 4, "coco")
    torch.testing.assert_close(metrics.ap50, precision[0].mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(metrics.ap50_95, precision.mean((0, 1)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", ap.RULES)
def test_detections_inside_a_crowd_are_ignored(rule):
    """One object is detected; the crowd's four detections have higher scores, but are neither right nor wrong."""
    inside = [[100 + 20 * k, 100, 115 + 20 * k, 115] for k in range(4)]
    detections = single_class([*inside, A], [0.9, 0.8, 0.7, 0.6, 0.5])
    truth = single_class([[100, 100, 200, 200], A])
    crowd = GroundTruth(truth.boxes_xyxy, truth.labels, truth.difficult, torch.tensor([True, False]))
    metrics = ap.evaluate([detections], [crowd], 1, rule)
    assert metrics.map50 == pytest.approx(1)
    assert metrics.map50_95 == pytest.approx(1)
    assert int(metrics.num_truths[0]) == 1
    assert ap.confusion_matrix([detections], [crowd], 1, 0.1).tolist() == [[1, 0], [0, 0]]
    assert ap.recall_by_size([detections], [crowd], 0.1)["small"] == 1
    partly_inside = single_class([[190, 100, 220, 115], A], [0.9, 0.5])  # a third of the first box is inside the crowd
    assert ap.evaluate([partly_inside], [crowd], 1, rule).map50 == pytest.approx(0.5, abs=0.01)
    assert ap.confusion_matrix([partly_inside], [crowd], 1, 0.1).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("rule", ap.RULES)
def test_an_object_in_front_of_a_crowd_is_matched(rule):
    truth = single_class([A, [0, 0, 300, 300], B])
    crowd = GroundTruth(truth.boxes_xyxy, truth.labels, truth.difficult, torch.tensor([False, True, False]))
    metrics = ap.evaluate([single_class([[0, 0, 9, 10], B], [0.9, 0.8])], [crowd], 1, rule)
    assert metrics.map50 == pytest.approx(1)


def test_thresholds_equal_those_of_pycocotools():
    assert np.linspace(0.5, 0.95, 10).tolist() == list(ap.IOU_THRESHOLDS)


@pytest.mark.parametrize("rule", ap.RULES)
def test_images_with_very_different_numbers_of_boxes(rule, monkeypatch):
    """Groups are padded and processed in chunks: the result does not depend on the chunk size."""
    generator = torch.Generator().manual_seed(4)
    pairs = [random_image(generator, 1, True, True) for _ in range(12)]
    detections, ground_truth = [list(side) for side in zip(*pairs, strict=True)]
    all_boxes = torch.cat([detections[k].boxes_xyxy for k in range(12)])
    detections[3] = Detections(all_boxes, torch.linspace(1, 0, len(all_boxes)), torch.zeros(len(all_boxes)).long())
    ground_truth[5] = GroundTruth(
        all_boxes + 3, torch.zeros(len(all_boxes)).long(), torch.arange(len(all_boxes)) % 5 == 0
    )
    metrics = ap.evaluate(detections, ground_truth, 1, rule)
    assert metrics.map50 == pytest.approx(slow_ap(detections, ground_truth, 0, 0.5, rule), abs=1e-6)
    monkeypatch.setattr(ap, "MAX_CHUNK_ELEMENTS", 1)
    assert ap.evaluate(detections, ground_truth, 1, rule).map50_95 == metrics.map50_95


def single_class(boxes, scores=None, difficult=None):
    boxes_xyxy = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    labels = torch.zeros(len(boxes_xyxy), dtype=torch.int64)
    if scores is not None:
        return Detections(boxes_xyxy, torch.tensor(scores), labels)
    return GroundTruth(boxes_xyxy, labels, torch.tensor(difficult or [False] * len(boxes_xyxy)).bool())


A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]


class TestHandComputedCases:
    def test_eleven_points(self):
        """Right, wrong, right of two boxes: precision 1 up to recall 0.5, then 2/3."""
        detections, ground_truth = single_class([A, C, B], [0.9, 0.8, 0.7]), single_class([A, B])
        assert ap.evaluate([detections], [ground_truth], 1, "voc07").map50 == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
        assert ap.evaluate([detections], [ground_truth], 1, "voc").map50 == pytest.approx(0.5 + 0.5 * 2 / 3)
        assert ap.evaluate([detections], [ground_truth], 1, "coco").map50 == pytest.approx((51 + 50 * 2 / 3) / 101)

    def test_a_second_detection_of_the_same_box_is_wrong(self):
        detections = single_class([A, A, B], [0.9, 0.8, 0.7])
        assert ap.evaluate([detections], [single_class([A, B])], 1, "voc").map50 == pytest.approx(0.5 + 0.5 * 2 / 3)

    def test_difficult_boxes_are_ignored(self):
        detections, ground_truth = single_class([A, B], [0.9, 0.8]), single_class([A, B], difficult=[True, False])
        for rule in ap.RULES:
            metrics = ap.evaluate([detections], [ground_truth], 1, rule)
            assert metrics.map50 == pytest.approx(1)
            assert int(metrics.num_truths[0]) == 1

    def test_voc_does_not_look_for_a_second_best_box_but_coco_does(self):
        first, near = [0, 0, 10, 10], [2, 0, 12, 10]
        detections = single_class([first, [0.5, 0, 10.5, 10]], [0.9, 0.8])  # both overlap the first box more
        ground_truth = single_class([first, near])
        assert ap.evaluate([detections], [ground_truth], 1, "voc").map50 == pytest.approx(0.5)
        assert ap.evaluate([detections], [ground_truth], 1, "coco").map50 == pytest.approx(1)

    def test_coco_takes_the_last_of_equal_overlaps(self):
        ground_truth = single_class([[0, 0, 10, 10], [4, 0, 14, 10]])
        # the first detection lies in the middle between both boxes
        detections = single_class([[2, 0, 12, 10], [5, 0, 15, 10]], [0.9, 0.8])
        assert ap.evaluate([detections], [ground_truth], 1, "coco").map50 == pytest.approx(51 / 101)
        assert ap.evaluate([detections], [ground_truth], 1, "voc").map50 == pytest.approx(1)

    @pytest.mark.parametrize("rule", ap.RULES)
    def test_an_overlap_of_exactly_one_half_is_enough(self, rule):
        metrics = ap.evaluate([single_class([[0, 0, 5, 10]], [0.9])], [single_class([[0, 0, 10, 10]])], 1, rule)
        assert metrics.map50 == pytest.approx(1)
        assert metrics.map50_95 == pytest.approx(0.1)

    def test_no_detections_and_no_objects(self):
        for rule in ap.RULES:
            assert ap.evaluate([single_class([], [])], [single_class([A])], 1, rule).map50 == 0
            assert math.isnan(ap.evaluate([single_class([A], [0.5])], [single_class([])], 1, rule).map50)
            assert math.isnan(ap.evaluate([], [], 1, rule).map50)

    def test_coco_counts_a_hundred_detections_per_image(self):
        false_positives = [[100 + k, 0, 101 + k, 1] for k in range(100)]
        detections = single_class([*false_positives, A], [*(0.9 - 0.001 * k for k in range(100)), 0.5])
        assert ap.evaluate([detections], [single_class([A])], 1, "coco").map50 == 0
        assert ap.evaluate([detections], [single_class([A])], 1, "voc").map50 == pytest.approx(1 / 101)

    def test_curves(self):
        metrics = ap.evaluate([single_class([A, C, B], [0.9, 0.8, 0.7])], [single_class([A, B])], 1, "voc")
        assert metrics.recalls[0].tolist() == [0.5, 0.5, 1.0]
        assert metrics.precisions[0].tolist() == pytest.approx([1, 0.5, 2 / 3])


def test_confusion_matrix():
    detections = Detections(torch.tensor([A, B, C]).float(), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]))
    ground_truth = GroundTruth(
        torch.tensor([A, B, [0, 50, 10, 60]]).float(), torch.tensor([0, 1, 1]), torch.zeros(3).bool()
    )
    matrix = ap.confusion_matrix([detections], [ground_truth], 2, 0.5)
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert ap.confusion_matrix([detections], [ground_truth], 2, 0.85).tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert ap.confusion_matrix([], [], 2, 0.5).tolist() == [[0] * 3] * 3
    no_detections = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0).long())
    assert ap.confusion_matrix([no_detections], [ground_truth], 2, 0.5).tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]
    assert ap.confusion_matrix([detections], [single_class([])], 2, 0.5).tolist() == [[0, 0, 0], [0, 0, 0], [2, 1, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_confusion_matrix_matches_the_loop(seed):
    detections, ground_truth = random_images(seed, ties=True, difficult=True)
    expected = [[0] * 5 for _ in range(5)]
    for f, t in zip(detections, ground_truth, strict=True):
        free = set(range(len(t.labels)))
        for k in sorted(range(len(f.labels)), key=lambda k: -float(f.scores[k])):
            if float(f.scores[k]) < 0.4:
                continue
            overlaps = {m: overlap(f.boxes_xyxy[k].tolist(), t.boxes_xyxy[m].tolist()) for m in sorted(free)}
            best = max(overlaps, key=lambda m: overlaps[m], default=None)
            if best is None or overlaps[best] < 0.45:
                expected[4][f.labels[k]] += 1
                continue
            free.remove(best)
            if not t.difficult[best]:
                expected[t.labels[best]][f.labels[k]] += 1
        for m in free:
            expected[t.labels[m]][4] += not t.difficult[m]
    actual = ap.confusion_matrix(detections, ground_truth, 4, score_threshold=0.4, iou_threshold=0.45)
    assert actual.tolist() == expected
    assert actual.dtype == torch.int64
    assert int(actual[:4].sum()) == sum(int((~t.difficult).sum()) for t in ground_truth)


def test_a_label_out_of_range_is_rejected():
    with pytest.raises(AssertionError, match="no class"):
        ap.evaluate([Detections(torch.zeros(1, 4), torch.ones(1), torch.tensor([1]))], [single_class([A])], 1, "voc")


def test_boxes_without_area_are_never_right():
    point = [5, 5, 5, 5]
    for rule in ap.RULES:
        assert ap.evaluate([single_class([point], [0.9])], [single_class([point])], 1, rule).map50 == 0


def test_recall_by_size():
    small, large = [0, 0, 10, 10], [0, 0, 200, 200]
    ground_truth = single_class([small, large])
    detections = single_class([large], [0.9])
    result = ap.recall_by_size([detections], [ground_truth], 0.5)
    assert result["small"] == 0
    assert result["large"] == 1
    assert math.isnan(result["medium"])
    assert all(math.isnan(share) for share in ap.recall_by_size([], [], 0.5).values())


def test_recall_by_size_ignores_other_classes_low_scores_and_difficult_boxes():
    sides = [31, 32, 95, 96, 31]  # small ends below 32^2, medium below 96^2
    ground_truth = single_class(
        [[200 * k, 0, 200 * k + side, side] for k, side in enumerate(sides)], difficult=[False] * 4 + [True]
    )
    detections = Detections(
        ground_truth.boxes_xyxy, torch.tensor([0.9, 0.9, 0.4, 0.9, 0.0]), torch.tensor([0, 0, 0, 1, 0])
    )
    assert ap.recall_by_size([detections], [ground_truth], 0.5) == {"small": 1, "medium": 0.5, "large": 0}
    assert ap.recall_by_size([detections], [ground_truth], 0.4) == {"small": 1, "medium": 1, "large": 0}
