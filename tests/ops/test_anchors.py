"""Anchors: the worked example of the course, slow references, no boxes, ties."""

import pytest
import torch

from cvlab.ops import anchors, boxes

ANCHOR_SHAPES = torch.tensor(anchors.COURSE_SHAPES).float()
COURSE_IOUS = [0.1007, 0.4029, 0.7454, 0.5733, 0.3971, 0.5918, 0.5216, 0.6619, 0.4799]


def random_boxes(count, span, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * span
    return torch.cat([corners.amin(1), corners.amax(1) + 0.1], 1)


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def slow_anchors(height, width, shapes):
    """List all anchors in the order (A, H, W)."""
    return [
        (c + 0.5 - w / 2, r + 0.5 - h / 2, c + 0.5 + w / 2, r + 0.5 + h / 2)
        for w, h in shapes
        for r in range(height)
        for c in range(width)
    ]


def slow_match_anchors_to_boxes(box, height, width, shapes):
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    cells = [(abs(c + 0.5 - x) + abs(r + 0.5 - y), r * width + c) for r in range(height) for c in range(width)]
    cell = min(cells)[1]
    all_anchors = slow_anchors(height, width, shapes)
    ious = [slow_iou(all_anchors[a * height * width + cell], box) for a in range(len(shapes))]
    best = ious.index(max(ious))
    return best * height * width + cell, ious[best]


class TestWorkedExample:
    """A car at 156, 97, 351, 270 in a photo of 500 x 333 pixels under 7 x 7 cells."""

    car = torch.tensor([[156.0, 97, 351, 270]]) * 7 / torch.tensor([500.0, 333, 500, 333])
    centers = anchors.grid_centers(7, 7)

    def test_nearest_cell(self):
        in_pixels = self.centers * torch.tensor([500.0, 333]) / 7
        assert in_pixels[3, 3].tolist() == pytest.approx([250.0, 166.5])
        distances = (in_pixels - torch.tensor([253.5, 183.5])).abs().sum(-1).flatten().sort()
        assert distances.values[:2].tolist() == pytest.approx([20.5, 34.07], abs=0.005)
        assert distances.indices[0] == 3 * 7 + 3

    def test_ious_of_the_nine_anchors(self):
        at_cell = anchors.generate_anchors(self.centers, ANCHOR_SHAPES)[:, 3, 3]
        assert boxes.iou(at_cell, self.car)[:, 0].tolist() == pytest.approx(COURSE_IOUS, abs=1e-4)

    def test_matched_anchor(self):
        index, overlap = anchors.match_anchors_to_boxes(self.car, self.centers, ANCHOR_SHAPES)
        assert index.tolist() == [122]
        assert overlap.item() == pytest.approx(0.7454, abs=1e-4)
        all_anchors = anchors.generate_anchors(self.centers, ANCHOR_SHAPES)
        assert all_anchors.shape == (9, 7, 7, 4)
        assert all_anchors[..., 0].numel() == 441
        assert torch.equal(all_anchors.flatten(0, 2)[122], all_anchors[2, 3, 3])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 7), (3, 5)])
class TestEachMap:
    def test_centers_and_anchors(self, height, width):
        centers = anchors.grid_centers(height, width)
        assert centers.tolist() == [[[c + 0.5, r + 0.5] for c in range(width)] for r in range(height)]
        actual = anchors.generate_anchors(centers, ANCHOR_SHAPES)
        expected = torch.tensor(slow_anchors(height, width, anchors.COURSE_SHAPES))
        torch.testing.assert_close(actual.flatten(0, 2), expected)

    def test_match_anchors_to_boxes_matches_the_loop(self, height, width):
        ground_truth = random_boxes(60, max(height, width))
        index, overlap = anchors.match_anchors_to_boxes(
            ground_truth, anchors.grid_centers(height, width), ANCHOR_SHAPES
        )
        expected = [
            slow_match_anchors_to_boxes(box, height, width, anchors.COURSE_SHAPES) for box in ground_truth.tolist()
        ]
        assert index.tolist() == [pair[0] for pair in expected]
        torch.testing.assert_close(overlap, torch.tensor([pair[1] for pair in expected]))


def test_ties_go_to_the_first():
    centers = anchors.grid_centers(2, 2)
    corner = torch.tensor([[0.0, 0, 2, 2]])  # its center is equally far from all four cells
    assert anchors.match_anchors_to_boxes(corner, centers, ANCHOR_SHAPES)[0].item() % 4 == 0
    twins = torch.tensor([[1.0, 1], [2, 2], [2, 2]])
    assert anchors.match_anchors_to_boxes(torch.tensor([[0.0, 0, 1, 1]]), centers, twins)[0].item() == 0
    assert anchors.match_anchors_to_boxes(torch.tensor([[-0.5, -0.5, 1.5, 1.5]]), centers, twins)[0].item() == 4
    boxes_xyxy = torch.tensor([[0.1, 0.2, 0.8, 0.9]]).repeat(2, 1)
    assert len(set(anchors.match_anchors_to_boxes(boxes_xyxy, centers, ANCHOR_SHAPES)[0].tolist())) == 1


def test_without_boxes():
    index, overlap = anchors.match_anchors_to_boxes(torch.empty(0, 4), anchors.grid_centers(7, 7), ANCHOR_SHAPES)
    assert index.shape == overlap.shape == (0,)
    assert index.dtype == torch.int64


@pytest.mark.parametrize("count", [0, 1, 6])
def test_negative_mask_matches_the_loop(count):
    all_anchors = anchors.generate_anchors(anchors.grid_centers(7, 7), ANCHOR_SHAPES).flatten(0, 2)
    ground_truth = random_boxes(count, 7, seed=3)
    expected = [all(slow_iou(a, b) < 0.2 for b in ground_truth.tolist()) for a in all_anchors.tolist()]
    assert anchors.negative_mask(boxes.iou(all_anchors, ground_truth)).tolist() == expected
    assert (count == 0) == all(expected)


def test_negative_mask_at_the_threshold():
    overlap = torch.tensor([[0.2, 0.0], [0.1999, 0.1999], [0.0, 0.3]])
    assert anchors.negative_mask(overlap).tolist() == [False, True, False]
    assert anchors.negative_mask(overlap, low=0.1).tolist() == [False, False, False]
    assert anchors.negative_mask(overlap[None], low=1.0).tolist() == [[True, True, True]]


def slow_matches(overlap, high, low):
    """Match anchor by anchor, as described in section 3.1.2 of "Faster R-CNN"."""
    labels, matched_boxes = [], []
    for row in overlap:
        best_of = [m for m, value in enumerate(row) if value > 0 and value == max(other[m] for other in overlap)]
        matched_box = row.index(max(row)) if row else 0
        if row and max(row) > high:
            labels.append(1)
        elif best_of:
            labels.append(1)
            matched_box = max(best_of, key=lambda m, row=row: (row[m], -m))
        else:
            labels.append(0 if not row or max(row) < low else -1)
        matched_boxes.append(matched_box)
    return labels, matched_boxes


@pytest.mark.parametrize("count", [0, 1, 2, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_match_by_iou_matches_the_loop(count, seed):
    all_anchors = anchors.generate_anchors(anchors.grid_centers(7, 7), ANCHOR_SHAPES).flatten(0, 2)
    ground_truth = random_boxes(count, 7, seed)
    overlap = (boxes.iou(all_anchors, ground_truth) * 20).round() / 20  # ties
    labels, chosen = anchors.match_by_iou(overlap, 0.7, 0.3)
    assert (labels.tolist(), chosen.tolist()) == slow_matches(overlap.tolist(), 0.7, 0.3)


def test_a_box_keeps_its_best_anchor_even_if_that_overlaps_another_box_more():
    overlap = torch.tensor([[0.4, 0.6], [0.0, 0.65], [0.1, 0.2], [0.0, 0.0]])
    labels, chosen = anchors.match_by_iou(overlap, 0.7, 0.3)
    assert labels.tolist() == [1, 1, 0, 0]
    assert chosen.tolist()[:2] == [0, 1]
