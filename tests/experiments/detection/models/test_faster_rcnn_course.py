"""The two-stage detector of the course: matched anchors, losses against a loop, proposals."""

import torch

from cvlab.experiments.detection.models import faster_rcnn_course
from cvlab.experiments.detection.models.base import collate_targets
from cvlab.experiments.detection.models.faster_rcnn import decode
from cvlab.experiments.detection.models.faster_rcnn_course import FasterRcnnCourse
from cvlab.ops import boxes

NO_BOXES = (torch.zeros(0, 4), torch.zeros(0).long())


def model_and_map(n=2):
    torch.manual_seed(0)
    return FasterRcnnCourse([6], 3, width=8, hidden=8, dropout=0.0), [torch.randn(n, 6, 7, 7)]


def make_targets(*images):
    return collate_targets([box for box, _ in images], [label for _, label in images])


ONE_BOX = (torch.tensor([[32.0, 64, 96, 160]]), torch.tensor([2]))  # 2 x 3 cells, starting at cell (1, 2)


def test_match_anchors_by_iou():
    model, maps = model_and_map()
    outputs = model(maps)
    assert outputs.objectness_logits.shape == (2, 441, 2)
    assert outputs.deltas.shape == (2, 441, 4)
    positives, is_negative = model.match_anchors(outputs, make_targets(ONE_BOX, NO_BOXES))
    overlap = boxes.iou(model.anchors(outputs), ONE_BOX[0] / 32)[:, 0]
    expected = set((overlap > 0.7).nonzero()[:, 0].tolist()) | {int(overlap.argmax())}
    assert expected <= set(positives.anchor.tolist())
    assert bool((positives.image == 0).all())
    assert float(overlap[positives.anchor].min()) >= min(0.7, float(overlap.max()))
    assert positives.labels.tolist() == [2] * len(positives.anchor)
    assert torch.equal(is_negative[0], overlap < 0.3)
    assert bool(is_negative[1].all())


def test_channels_are_logits_then_deltas_anchor_by_anchor():
    model, maps = model_and_map(1)
    raw = model.rpn_predictor(model.rpn_conv(maps[0]))[0]  # (54, 7, 7)
    outputs = model(maps)
    anchor, row, column = 4, 3, 5
    index = (anchor * 7 + row) * 7 + column
    torch.testing.assert_close(outputs.objectness_logits[0, index], raw[2 * anchor : 2 * anchor + 2, row, column])
    torch.testing.assert_close(outputs.deltas[0, index], raw[18 + 4 * anchor : 22 + 4 * anchor, row, column])


def test_losses_match_the_loop_and_are_finite_without_objects():
    model, maps = model_and_map()
    outputs = model(maps)
    targets = make_targets(ONE_BOX, NO_BOXES)
    torch.manual_seed(3)
    losses = model.losses(outputs, targets, 224)
    positives, _ = model.match_anchors(outputs, targets)
    anchors_xyxy, box_sum, class_sum = model.anchors(outputs), 0.0, 0.0
    for image, anchor, label, box in zip(*positives, strict=True):
        ax, ay, aw, ah = boxes.xyxy_to_cxcywh(anchors_xyxy[anchor]).tolist()
        bx, by, bw, bh = boxes.xyxy_to_cxcywh(box).tolist()
        expected = torch.tensor([(bx - ax) / aw, (by - ay) / ah, bw / aw, bh / ah])
        expected[2:] = expected[2:].log()
        error = (outputs.deltas[image, anchor] - expected).abs()
        box_sum += torch.where(error < 1, 0.5 * error**2, error - 0.5).sum().item()
        region = decode(outputs.deltas[image, anchor][None], anchors_xyxy[anchor][None])
        scores = model.box_head(outputs, model.clip(region, outputs), image[None])[0]
        class_sum -= scores.log_softmax(0)[label].item()
    torch.testing.assert_close(losses["rpn_box_loss"].item(), box_sum / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["class_loss"].item(), class_sum / 2, rtol=1e-5, atol=1e-5)
    parts = losses["rpn_class_loss"] + 5 * losses["rpn_box_loss"]
    torch.testing.assert_close(losses["rpn_loss"], parts)
    torch.testing.assert_close(losses["loss"], parts + losses["class_loss"])
    losses_without_objects = model.losses(outputs, make_targets(NO_BOXES, NO_BOXES), 224)
    losses_without_objects["loss"].backward()
    assert losses_without_objects["loss"].item() == 0


def test_overfits_an_image():
    model, maps = model_and_map(1)
    expected = (torch.tensor([[32.0, 64, 96, 160], [100, 10, 200, 120]]), torch.tensor([2, 0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model.losses(model(maps), make_targets(expected), 224)["loss"].backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        detections = model.postprocess(model(maps), 224, 0.5, 0.3, 100)[0]
        before, after = model.generate_proposals(model(maps))[0]
    assert len(before) >= len(after) >= 2
    assert bool((after <= 224).all())
    assert float(boxes.iou(after, after).fill_diagonal_(0).max()) <= faster_rcnn_course.PROPOSAL_NMS_IOU
    overlap = boxes.iou(detections.boxes_xyxy, expected[0])
    for column, label in enumerate((2, 0)):
        best = int(overlap[:, column].argmax())
        assert float(overlap[best, column]) > 0.6
        assert int(detections.labels[best]) == label
