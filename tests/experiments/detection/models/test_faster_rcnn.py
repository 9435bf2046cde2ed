"""Faster R-CNN: deltas, anchors, proposals, losses, detections."""

import torch

from cvlab.experiments.detection.models import faster_rcnn
from cvlab.experiments.detection.models.base import collate_targets
from cvlab.experiments.detection.models.faster_rcnn import FasterRcnn
from cvlab.ops import boxes


def random_boxes(count, reach, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * reach
    return torch.cat([low, low + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60], 1)


class TestParts:
    def test_encode_and_decode_are_inverse(self):
        anchors, expected = random_boxes(20, 100, 1) + torch.tensor([0.0, 0, 5, 5]), random_boxes(20, 100, 2)
        expected = expected + torch.tensor([0.0, 0, 5, 5])
        decoded = faster_rcnn.decode(faster_rcnn.encode(expected, anchors), anchors)
        torch.testing.assert_close(decoded, expected)
        large = faster_rcnn.decode(torch.full((20, 4), 100.0).double(), anchors)
        assert bool(torch.isfinite(large).all())

    def test_anchors(self):
        anchors = faster_rcnn.anchors_at(torch.tensor([[8.0, 24, 16]]))[0]
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        torch.testing.assert_close(centers, torch.tensor([[8.0, 24]]).expand(3, 2))
        torch.testing.assert_close(boxes.area(anchors), torch.full((3,), (6.0 * 16) ** 2))
        sides = anchors[:, 2:] - anchors[:, :2]
        torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor(faster_rcnn.ASPECT_RATIOS))

    def test_match_anchors(self):
        anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [4, 0, 14, 10], [50, 50, 60, 60], [70, 70, 80, 80]])
        ground_truth = torch.tensor([[0.0, 0, 10, 10], [74, 70, 84, 80]])
        positive, negative, matched = faster_rcnn.match_anchors(anchors, ground_truth)
        assert positive.tolist() == [0, 1, 4], "IoU over 0.7 twice, and the best anchor of the second box"
        assert negative.tolist() == [3]
        assert matched[positive].tolist() == [0, 0, 1]
        positive, negative, _ = faster_rcnn.match_anchors(anchors, ground_truth[:0])
        assert len(positive) == 0
        assert len(negative) == 5


def model_and_maps(n=2):
    torch.manual_seed(0)
    model = FasterRcnn([4, 6, 8], 3, width=8, hidden=16)
    return model, [torch.randn(n, c, s, s) for c, s in ((4, 16), (6, 8), (8, 4))]


class TestFasterRcnn:
    def test_proposals_are_inside_and_sorted(self):
        model, maps = model_and_maps()
        outputs = model(maps)
        assert outputs.objectness_logits.shape == (2, 3 * (256 + 64 + 16))
        assert outputs.size_px == 128
        for _, proposals in model.generate_proposals(outputs):
            assert 0 < len(proposals) <= faster_rcnn.POST_NMS_TOP_K
            assert bool((proposals >= 0).all())
            assert bool((proposals <= 128).all())
            assert float(boxes.iou(proposals, proposals).fill_diagonal_(0).max()) <= faster_rcnn.PROPOSAL_NMS_IOU

    def test_losses_with_and_without_objects(self):
        model, maps = model_and_maps()
        no_targets = collate_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2)
        losses = model.losses(model(maps), no_targets, 128)
        losses["loss"].backward()
        assert all(bool(torch.isfinite(value)) for value in losses.values())
        assert losses["rpn_box_loss"].item() == losses["box_loss"].item() == 0
        targets = collate_targets(
            [torch.tensor([[10.0, 10, 60, 50]]), torch.zeros(0, 4)], [torch.tensor([1]), torch.zeros(0).long()]
        )
        losses = model.losses(model(maps), targets, 128)
        assert losses["box_loss"].item() > 0
        assert losses["rpn_box_loss"].item() > 0

    def test_the_same_seed_samples_the_same_proposals(self):
        model, maps = model_and_maps()
        model.eval()
        targets = collate_targets([torch.tensor([[10.0, 10, 60, 50]])] * 2, [torch.tensor([1])] * 2)
        values = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            values.append(model.losses(model(maps), targets, 128)["loss"].item())
        assert values[0] == values[1] != values[2]

    def test_overfits_an_image(self):
        model, maps = model_and_maps(1)
        expected = torch.tensor([[20.0, 30, 70, 90], [80, 10, 120, 40]])
        targets = collate_targets([expected], [torch.tensor([2, 0])])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model.losses(model(maps), targets, 128)["loss"].backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            detections = model.postprocess(model(maps), 128, 0.3, 0.5, 100)[0]
        assert detections.scores.tolist() == sorted(detections.scores.tolist(), reverse=True)
        overlap = boxes.iou(detections.boxes_xyxy, expected)
        for column, label in enumerate((2, 0)):
            best = int(overlap[:, column].argmax())
            assert float(overlap[best, column]) > 0.6
            assert int(detections.labels[best]) == label

    def test_the_score_approaches_the_confidence_of_the_label(self):
        model, maps = model_and_maps(1)
        targets = collate_targets([torch.tensor([[20.0, 30, 70, 90]])], [torch.tensor([2])], [torch.tensor([0.4])])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(80):
            optimizer.zero_grad()
            model.losses(model(maps), targets, 128)["loss"].backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            detections = model.postprocess(model(maps), 128, 0.05, 0.5, 100)[0]
        assert int(detections.labels[0]) == 2
        assert 0.25 < float(detections.scores[0]) < 0.55
