"""Boxes, non-maximum suppression, anchors, assignment: against slow references, with empty inputs and ties."""

import math

import pytest
import torch

from cvlab.ops import anchors, assignment, boxes, nms


def random_boxes(count, seed=0, span=100.0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * span
    return torch.cat([low, low + 5 + 40 * torch.rand(count, 2, generator=generator, dtype=torch.float64)], 1)


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def slow_giou(a, b):
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - max(width, 0) * max(height, 0)
    return slow_iou(a, b) - (hull - union) / hull


class TestOverlap:
    def test_all_pairs(self):
        a, b = random_boxes(7), random_boxes(5, 1)
        expected = torch.tensor([[slow_iou(x, y) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
        torch.testing.assert_close(boxes.iou(a, b), expected)
        expected = torch.tensor([[slow_giou(x, y) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
        torch.testing.assert_close(boxes.giou(a, b), expected)
        torch.testing.assert_close(boxes.paired_iou(a[:5], b), boxes.iou(a[:5], b).diagonal())
        torch.testing.assert_close(boxes.paired_giou(a[:5], b), boxes.giou(a[:5], b).diagonal())

    def test_bounds(self):
        box = torch.tensor([[0.0, 0, 10, 10]])
        far = torch.tensor([[1000.0, 0, 1010, 10]])
        assert float(boxes.iou(box, box)) == float(boxes.giou(box, box)) == 1
        assert float(boxes.iou(box, far)) == 0
        assert -1 < float(boxes.giou(box, far)) < -0.9

    def test_empty_boxes_and_no_boxes(self):
        point = torch.tensor([[3.0, 3, 3, 3]])
        turned = torch.tensor([[5.0, 5, 1, 1]])
        assert float(boxes.iou(point, point)) == 0
        assert float(boxes.area(turned)) == 0
        none = torch.empty(0, 4)
        assert boxes.iou(none, point).shape == (0, 1)
        assert boxes.giou(point, none).shape == (1, 0)
        assert boxes.paired_giou(none, none).shape == (0,)

    def test_gradients(self):
        a, b = random_boxes(6).requires_grad_(), random_boxes(6, 3)
        assert torch.autograd.gradcheck(lambda x: boxes.paired_giou(x, b), a)
        point = torch.tensor([[3.0, 3, 3, 3]], requires_grad=True)
        boxes.paired_giou(point, point.detach()).sum().backward()
        assert bool(torch.isfinite(point.grad).all())
        assert torch.autograd.gradcheck(lambda x: boxes.paired_iou(x, b), a)

    def test_boxes_without_area_have_no_steep_gradient(self):
        thin = torch.tensor([[3.0, 3, 3, 1003], [5, 5, 1, 1], [0, 0, 0, 0]], requires_grad=True)
        for loss in (boxes.paired_iou, boxes.paired_giou):
            for other in (thin.detach(), torch.tensor([[0.0, 0, 10, 10]] * 3)):
                (gradient,) = torch.autograd.grad(loss(thin, other).sum(), thin)
                assert float(gradient.abs().max()) <= 1000

    def test_overlap_does_not_depend_on_the_scale(self):
        a, b = random_boxes(7), random_boxes(5, 1)
        for scale in (1e-7, 1e6):
            torch.testing.assert_close(boxes.iou(a * scale, b * scale), boxes.iou(a, b))
            torch.testing.assert_close(boxes.giou(a * scale, b * scale), boxes.giou(a, b))

    def test_area(self):
        actual = boxes.area(torch.tensor([[1.0, 2, 4, 7], [4, 2, 1, 7], [4, 7, 1, 2], [3, 3, 3, 9]]))
        assert actual.tolist() == [15, 0, 0, 0]
        assert boxes.area(torch.empty(0, 4)).shape == (0,)

    def test_conversions_are_inverse(self):
        a = random_boxes(9)
        torch.testing.assert_close(boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(a)), a)

    def test_conversions_match_hand_computed_values(self):
        box = torch.tensor([[1.0, 2, 4, 8]])
        assert boxes.xyxy_to_cxcywh(box).tolist() == [[2.5, 5, 3, 6]]
        assert boxes.cxcywh_to_xyxy(torch.tensor([[2.5, 5, 3, 6]])).equal(box)
        for convert in (boxes.xyxy_to_cxcywh, boxes.cxcywh_to_xyxy):
            assert convert(box[:0]).shape == (0, 4)

    def test_clip(self):
        actual = boxes.clip(torch.tensor([[-5.0, 2, 30, 40], [-9, 30, -2, 31], [3, 4, 5, 6]]), 20, 25)
        assert actual.tolist() == [[0, 2, 20, 25], [0, 25, 0, 25], [3, 4, 5, 6]]
        assert boxes.clip(actual[:0], 20, 25).shape == (0, 4)


def slow_nms(boxes_xyxy, scores, threshold):
    remaining = sorted(range(len(scores)), key=lambda k: (-float(scores[k]), k))
    selected = []
    while remaining:
        selected.append(remaining.pop(0))
        remaining = [
            k for k in remaining if slow_iou(boxes_xyxy[selected[-1]].tolist(), boxes_xyxy[k].tolist()) <= threshold
        ]
    return selected


class TestNms:
    @pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
    @pytest.mark.parametrize("count", [0, 1, 2, 60, 400])
    def test_matches_the_loop(self, count, threshold):
        boxes_xyxy, scores = random_boxes(count, 1), torch.rand(count, generator=torch.Generator().manual_seed(2))
        scores = (scores * 20).round() / 20  # ties
        expected = slow_nms(boxes_xyxy, scores, threshold)
        assert nms.nms(boxes_xyxy, scores, threshold).tolist() == expected
        assert nms.nms(boxes_xyxy, scores, threshold, max_detections=3).tolist() == expected[:3]

    def test_a_chain_within_a_block(self):
        """A overlaps B, B overlaps C, C overlaps D: A suppresses B, so that C stays and suppresses D."""
        low = torch.arange(8.0)[:, None] * 4
        chain = torch.cat([low, torch.zeros(8, 1), low + 10, torch.ones(8, 1)], 1)
        assert nms.nms(chain, torch.linspace(1, 0.5, 8), 0.3).tolist() == [0, 2, 4, 6]

    def test_batched_nms(self):
        boxes_xyxy, scores = random_boxes(80, 5), torch.rand(80, generator=torch.Generator().manual_seed(6))
        labels = torch.arange(80) % 3
        expected = set()
        for label in range(3):
            indices = (labels == label).nonzero()[:, 0]
            expected |= {int(indices[k]) for k in slow_nms(boxes_xyxy[indices], scores[indices], 0.3)}
        selected = nms.batched_nms(boxes_xyxy, scores, labels, 0.3)
        assert set(selected.tolist()) == expected
        assert scores[selected].tolist() == sorted(scores[selected].tolist(), reverse=True)
        assert len(nms.batched_nms(boxes_xyxy[:0], scores[:0], labels[:0], 0.3)) == 0

    @pytest.mark.parametrize(("span", "threshold"), [(200.0, 0.6), (1500.0, 0.3)])
    def test_over_many_blocks(self, span, threshold):
        boxes_xyxy = random_boxes(2000, 3, span).float()
        scores = torch.randint(0, 500, (2000,), generator=torch.Generator().manual_seed(4)).float()  # ties
        expected, is_suppressed = [], torch.zeros(2000, dtype=torch.bool)
        for k in sorted(range(2000), key=lambda k: (-float(scores[k]), k)):
            if not is_suppressed[k]:
                expected.append(k)
                is_suppressed |= boxes.iou(boxes_xyxy[k : k + 1], boxes_xyxy)[0] > threshold
        assert len(expected) > 3 * nms.BLOCK_SIZE or span < 1000
        assert nms.nms(boxes_xyxy, scores, threshold).tolist() == expected
        for limit in (300, 600):
            assert nms.nms(boxes_xyxy, scores, threshold, max_detections=limit).tolist() == expected[:limit]
        assert nms.nms(boxes_xyxy, scores, threshold, max_detections=0).tolist() == []

    def test_an_overlap_at_the_threshold_is_kept(self):
        halves = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 2]])
        assert nms.nms(halves, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1, 0]
        assert nms.nms(halves, torch.tensor([0.5, 0.9]), 0.49).tolist() == [1]

    def test_half_precision(self):
        large = torch.tensor([[0.0, 0, 1000, 1000], [0, 0, 1000, 900]]).half()  # areas over float16's 65504
        assert nms.nms(large, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1]

    def test_batched_nms_is_exact_at_large_coordinates(self):
        """Offsetting the boxes of each class would cost the coordinates the bit that decides in this case."""
        boxes_xyxy = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5 + 2**-20, 1], [0, 0, 0.5, 1]])
        scores = torch.tensor([0.9, 0.8, 0.7])
        assert nms.batched_nms(boxes_xyxy, scores, torch.tensor([50_000, 50_000, 50_000]), 0.5).tolist() == [0, 2]
        assert nms.batched_nms(boxes_xyxy, scores, torch.tensor([50_000, 2, 50_000]), 0.5).tolist() == [0, 1, 2]

    def test_batched_nms_with_ties_and_a_limit(self):
        boxes_xyxy = torch.tensor([[k * 20.0, 0, k * 20 + 10, 10] for k in range(6)])
        labels = torch.tensor([1, 0, 1, 0, 2, 0])
        assert nms.batched_nms(boxes_xyxy, torch.ones(6), labels, 0.5).tolist() == [0, 1, 2, 3, 4, 5]
        scores = torch.tensor([0.1, 0.9, 0.2, 0.9, 0.5, 0.7])
        assert nms.batched_nms(boxes_xyxy, scores, labels, 0.5, max_detections=4).tolist() == [1, 3, 5, 4]

    def test_boxes_without_area_do_not_suppress_each_other(self):
        points = torch.zeros(3, 4)
        assert nms.nms(points, torch.ones(3), 0.5).tolist() == [0, 1, 2]


CENTERS = anchors.grid_centers(7, 7)
SHAPES = torch.tensor(anchors.COURSE_SHAPES, dtype=torch.float32)


def slow_matches(iou, high, low):
    labels, matched = [], []
    for row in iou:
        best_of = [m for m, value in enumerate(row) if value > 0 and value == max(other[m] for other in iou)]
        box = max(range(len(row)), key=lambda m: row[m])
        if row[box] <= high and best_of:
            box = max(best_of, key=lambda m: row[m])
        labels.append(1 if row[box] > high or best_of else 0 if max(row) < low else -1)
        matched.append(box)
    return labels, matched


class TestAnchors:
    def test_grid_centers(self):
        actual = anchors.grid_centers(2, 3)
        assert actual.tolist() == [[[0.5, 0.5], [1.5, 0.5], [2.5, 0.5]], [[0.5, 1.5], [1.5, 1.5], [2.5, 1.5]]]

    def test_anchors(self):
        actual = anchors.generate_anchors(CENTERS, SHAPES)
        assert actual.shape == (9, 7, 7, 4)
        assert actual[5, 3, 1].tolist() == [0.5, 2, 2.5, 5]  # 2 wide, 3 high, around (1.5, 3.5)
        assert anchors.generate_anchors(CENTERS, SHAPES[:0]).shape == (0, 7, 7, 4)

    def test_worked_example_of_the_course(self):
        """A photo of 500 x 333, a car at 156, 97, 351, 270."""
        car = torch.tensor([[156.0, 97, 351, 270]]) * 7 / torch.tensor([500.0, 333, 500, 333])
        overlaps = boxes.iou(anchors.generate_anchors(CENTERS, SHAPES)[:, 3, 3], car)[:, 0]
        expected = [0.1007, 0.4029, 0.7454, 0.5733, 0.3971, 0.5918, 0.5216, 0.6619, 0.4799]
        assert overlaps.tolist() == pytest.approx(expected, abs=1e-4)
        index, overlap = anchors.match_anchors_to_boxes(car, CENTERS, SHAPES)
        assert index.tolist() == [122]
        assert 122 == 2 * 49 + 3 * 7 + 3
        assert float(overlap[0]) == pytest.approx(0.7454, abs=1e-4)

    @pytest.mark.parametrize("shape", [(7, 7), (3, 5), (1, 1)])
    def test_match_anchors_to_boxes_matches_the_loop(self, shape):
        centers, expected = anchors.grid_centers(*shape), random_boxes(30, 7, 50.0).float() / 8  # some beyond the map
        all_anchors = anchors.generate_anchors(centers, SHAPES)
        index, overlap = anchors.match_anchors_to_boxes(expected, centers, SHAPES)
        for box, index_of_box, max_iou in zip(expected.tolist(), index.tolist(), overlap.tolist(), strict=True):
            x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            cells = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
            i, j = min(cells, key=lambda c: abs(c[1] + 0.5 - x) + abs(c[0] + 0.5 - y))
            values = [slow_iou(all_anchors[a, i, j].tolist(), box) for a in range(9)]
            a = max(range(9), key=lambda a: values[a])
            assert index_of_box == int(torch.arange(9 * shape[0] * shape[1]).view(9, *shape)[a, i, j])
            assert max_iou == pytest.approx(values[a], abs=1e-5)

    def test_match_anchors_to_boxes_with_ties_without_area_and_without_boxes(self):
        ground_truth = torch.tensor([[2.0, 2, 4, 4], [3.5, 3.5, 3.5, 3.5]])  # centered between four cells; a point
        index, _ = anchors.match_anchors_to_boxes(ground_truth, CENTERS, SHAPES)
        assert index.tolist() == [2 * 49 + 2 * 7 + 2, 3 * 7 + 3]
        index, overlap = anchors.match_anchors_to_boxes(ground_truth[:0], CENTERS, SHAPES)
        assert index.shape == overlap.shape == (0,)
        assert index.dtype == torch.int64

    @pytest.mark.parametrize("seed", range(5))
    def test_match_by_iou_matches_the_loop(self, seed):
        iou = torch.rand(40, 6, generator=torch.Generator().manual_seed(seed)).pow(3)
        iou = (iou * 10).round() / 10  # ties
        iou[:20] *= 0.5  # anchors that overlap little
        iou[:, 2] = 0  # a box that nothing overlaps
        labels, matched = anchors.match_by_iou(iou, 0.5, 0.25)
        assert set(labels.tolist()) == {1, 0, -1}
        assert (labels.tolist(), matched.tolist()) == slow_matches(iou.tolist(), 0.5, 0.25)

    def test_each_box_keeps_its_best_anchor(self):
        labels, matched = anchors.match_by_iou(torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.4, 0.1]]), 0.7, 0.3)
        assert labels.tolist() == [1, 1, -1]
        assert matched.tolist() == [0, 1, 0]

    def test_matches_without_boxes_and_without_anchors(self):
        labels, matched = anchors.match_by_iou(torch.empty(3, 0), 0.7, 0.3)
        assert labels.tolist() == [0, 0, 0]
        assert matched.tolist() == [0, 0, 0]
        assert anchors.match_by_iou(torch.empty(0, 2), 0.7, 0.3)[0].shape == (0,)


def slow_assignment(scores, predictions, points, ground_truth, labels, top_k):
    """Assign image by image and box by box; return {(image, point): (box, quality)}."""
    assigned = {}
    for n in range(len(labels)):
        claims = {}
        for m, label in enumerate(labels[n].tolist()):
            if label < 0:
                continue
            box = ground_truth[n, m].tolist()
            inside = [p for p, (x, y, _) in enumerate(points.tolist()) if box[0] < x < box[2] and box[1] < y < box[3]]
            if not inside:
                x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                inside = [min(range(len(points)), key=lambda p: math.dist(points[p, :2], (x, y)) + points[p, 2])]
            overlap = {p: slow_iou(predictions[n, p].tolist(), box) for p in inside}
            fit = {p: float(scores[n, p, label]) ** 0.5 * overlap[p] ** 6 for p in inside}
            for p in sorted(inside, key=lambda p: -fit[p])[:top_k]:
                claims.setdefault(p, []).append((overlap[p], fit[p], m))
        claim_of_point = {p: max(claim, key=lambda c: c[0]) for p, claim in claims.items()}
        for p, (_, fit, m) in claim_of_point.items():
            claims_of_box = [c for c in claim_of_point.values() if c[2] == m]
            quality = fit / max(c[1] for c in claims_of_box) * max(c[0] for c in claims_of_box)
            assigned[n, p] = (m, quality)
    return assigned


class TestAssignment:
    def test_grid_points(self):
        points = assignment.grid_points([(2, 3), (1, 1)], (8, 16))
        assert points.tolist()[:3] == [[4, 4, 8], [12, 4, 8], [20, 4, 8]]
        assert points.tolist()[-1] == [8, 8, 16]

    @pytest.mark.parametrize("top_k", [1, 4, 10])
    def test_matches_the_loop(self, top_k):
        torch.manual_seed(0)
        points = assignment.grid_points([(8, 8), (4, 4)], (8, 16))
        predictions = torch.cat([points[:, :2] - 12, points[:, :2] + 12], 1) + torch.randn(3, len(points), 4) * 3
        scores = torch.rand(3, len(points), 2)
        ground_truth = random_boxes(12, 4, 30).float().view(3, 4, 4)
        labels = torch.tensor([[0, 1, 0, -1], [-1, -1, -1, -1], [1, 1, 0, 1]])
        ground_truth[2, 3] = torch.tensor([9.0, 9, 10, 10])  # no point lies in it
        assigned = assignment.assign_task_aligned(scores, predictions, points, ground_truth, labels, top_k)
        triples = zip(assigned.image.tolist(), assigned.point.tolist(), assigned.box.tolist(), strict=True)
        actual = {(n, p): (m, q) for (n, p, m), q in zip(triples, assigned.quality.tolist(), strict=True)}
        expected = slow_assignment(scores, predictions, points, ground_truth, labels, top_k)
        assert {key: m for key, (m, _) in actual.items()} == {key: m for key, (m, _) in expected.items()}
        for key, (_, quality) in expected.items():
            assert actual[key][1] == pytest.approx(quality, abs=1e-4)
        assert all(0 <= q <= 1 for _, q in actual.values())
        assert not any(n == 1 for n, _ in actual)

    def test_without_boxes(self):
        points = assignment.grid_points([(4, 4)], (8,))
        assigned = assignment.assign_task_aligned(
            torch.rand(2, 16, 3), torch.rand(2, 16, 4), points, torch.zeros(2, 1, 4), torch.full((2, 1), -1)
        )
        assert len(assigned.quality) == 0
