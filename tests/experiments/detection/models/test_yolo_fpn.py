"""The anchor-free detector: shapes, losses, perfect outputs, soft labels."""

import torch

from cvlab.experiments.detection.models.base import collate_targets
from cvlab.experiments.detection.models.dense import DenseOutputs
from cvlab.experiments.detection.models.yolo_fpn import YoloFpn


class TestYoloFpn:
    def test_shapes_and_no_object(self):
        torch.manual_seed(0)
        model = YoloFpn([4, 6, 8], 3, width=8)
        maps = [torch.randn(2, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))]
        scores, boxes_xyxy, points, _ = model(maps)
        assert scores.shape == (2, 84, 3)
        assert boxes_xyxy.shape == (2, 84, 4)
        assert points.shape == (84, 3)
        assert scores.sigmoid().mean().item() < 0.01
        assert bool((boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all())
        losses = model.losses(
            DenseOutputs(scores, boxes_xyxy, points),
            collate_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2),
            64,
        )
        losses["loss"].backward()
        assert bool(torch.isfinite(losses["loss"]))
        assert losses["box_loss"].item() == 0

    def test_perfect_outputs_have_a_small_loss_and_give_the_ground_truth(self):
        model = YoloFpn([4, 6, 8], 3, width=8)
        maps = [torch.randn(1, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))]
        points = model(maps).points
        expected = torch.tensor([[8.0, 8, 40, 40]])
        scores = torch.full((1, 84, 3), -12.0)
        inside = (points[:, :2] > 8).all(1) & (points[:, :2] < 40).all(1)
        scores[0, inside, 2] = 12.0
        perfect = DenseOutputs(scores, expected.expand(1, 84, 4).clone(), points)
        targets = collate_targets([expected], [torch.tensor([2])])
        losses = model.losses(perfect, targets, 64)
        wrong = model.losses(perfect, collate_targets([expected], [torch.tensor([1])]), 64)
        assert float(losses["box_loss"]) < 1e-5
        assert float(wrong["class_loss"]) > 5 * float(losses["class_loss"])
        detections = model.postprocess(perfect, 64, 0.5, 0.6, 10)[0]
        assert detections.boxes_xyxy.tolist() == expected.tolist()
        assert detections.labels.tolist() == [2]

    def test_the_score_approaches_the_confidence_of_the_label(self):
        model = YoloFpn([4, 6, 8], 3, width=8)
        maps = [torch.randn(1, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))]
        expected, label = torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1])
        targets = collate_targets([expected], [label], [torch.tensor([0.25])])
        assert targets.confidence.tolist() == [[0.25]]
        assert collate_targets([expected], [label]).confidence.tolist() == [[1.0]]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            model.losses(model(maps), targets, 64)["loss"].backward()
            optimizer.step()
        detections = model.postprocess(model(maps), 64, 0.01, 0.6, 10)[0]
        assert int(detections.labels[0]) == 1
        assert 0.15 < detections.scores[0].item() < 0.35
