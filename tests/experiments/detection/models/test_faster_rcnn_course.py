"""The course's two-stage detector: matched anchors, losses against a loop, proposals."""

import torch

from cvlab.experiments.detection.models import faster_rcnn_course
from cvlab.experiments.detection.models.base import collate_targets
from cvlab.experiments.detection.models.faster_rcnn import decode
from cvlab.experiments.detection.models.faster_rcnn_course import FasterRcnnCourse
from cvlab.ops import boxes

NONE = (torch.zeros(0, 4), torch.zeros(0).long())


def net_and_map(n=2):
    torch.manual_seed(0)
    return FasterRcnnCourse([6], 3, width=8, hidden=8, dropout=0.0), [torch.randn(n, 6, 7, 7)]


def targets(*pictures):
    return collate_targets([box for box, _ in pictures], [label for _, label in pictures])


ONE = (torch.tensor([[32.0, 64, 96, 160]]), torch.tensor([2]))  # 2 x 3 cells, from (1, 2): an anchor fits it nearly


def test_match_anchors_by_iou():
    net, maps = net_and_map()
    found = net(maps)
    assert found.objectness_logits.shape == (2, 441, 2)
    assert found.deltas.shape == (2, 441, 4)
    positives, is_negative = net.match_anchors(found, targets(ONE, NONE))
    overlap = boxes.iou(net.anchors(found), ONE[0] / 32)[:, 0]
    expected = set((overlap > 0.7).nonzero()[:, 0].tolist()) | {int(overlap.argmax())}
    assert expected <= set(positives.anchor.tolist())
    assert bool((positives.image == 0).all())
    assert float(overlap[positives.anchor].min()) >= min(0.7, float(overlap.max()))
    assert positives.labels.tolist() == [2] * len(positives.anchor)
    assert torch.equal(is_negative[0], overlap < 0.3)
    assert bool(is_negative[1].all())


def test_channels_are_logits_then_deltas_anchor_by_anchor():
    net, maps = net_and_map(1)
    raw = net.rpn_predictor(net.rpn_conv(maps[0]))[0]  # (54, 7, 7)
    found = net(maps)
    anchor, row, column = 4, 3, 5
    place = (anchor * 7 + row) * 7 + column
    torch.testing.assert_close(found.objectness_logits[0, place], raw[2 * anchor : 2 * anchor + 2, row, column])
    torch.testing.assert_close(found.deltas[0, place], raw[18 + 4 * anchor : 22 + 4 * anchor, row, column])


def test_losses_equal_the_loop_and_are_finite_without_objects():
    net, maps = net_and_map()
    found = net(maps)
    some = targets(ONE, NONE)
    torch.manual_seed(3)
    losses = net.losses(found, some, 224)
    positives, _ = net.match_anchors(found, some)
    every, box_sum, class_sum = net.anchors(found), 0.0, 0.0
    for image, anchor, label, box in zip(*positives, strict=True):
        ax, ay, aw, ah = boxes.xyxy_to_cxcywh(every[anchor]).tolist()
        bx, by, bw, bh = boxes.xyxy_to_cxcywh(box).tolist()
        wanted = torch.tensor([(bx - ax) / aw, (by - ay) / ah, bw / aw, bh / ah])
        wanted[2:] = wanted[2:].log()
        gap = (found.deltas[image, anchor] - wanted).abs()
        box_sum += torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).sum().item()
        region = decode(found.deltas[image, anchor][None], every[anchor][None])
        scores = net.box_head(found, net.clip(region, found), image[None])[0]
        class_sum -= scores.log_softmax(0)[label].item()
    torch.testing.assert_close(losses["rpn_box_loss"].item(), box_sum / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["class_loss"].item(), class_sum / 2, rtol=1e-5, atol=1e-5)
    parts = losses["rpn_class_loss"] + 5 * losses["rpn_box_loss"]
    torch.testing.assert_close(losses["rpn_loss"], parts)
    torch.testing.assert_close(losses["loss"], parts + losses["class_loss"])
    nothing = net.losses(found, targets(NONE, NONE), 224)
    nothing["loss"].backward()
    assert nothing["loss"].item() == 0


def test_overfits_an_image():
    net, maps = net_and_map(1)
    wanted = (torch.tensor([[32.0, 64, 96, 160], [100, 10, 200, 120]]), torch.tensor([2, 0]))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        net.losses(net(maps), targets(wanted), 224)["loss"].backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        found = net.postprocess(net(maps), 224, 0.5, 0.3, 100)[0]
        before, after = net.generate_proposals(net(maps))[0]
    assert len(before) >= len(after) >= 2
    assert bool((after <= 224).all())
    assert float(boxes.iou(after, after).fill_diagonal_(0).max()) <= faster_rcnn_course.PROPOSAL_NMS_IOU
    overlap = boxes.iou(found.boxes_xyxy, wanted[0])
    for column, label in enumerate((2, 0)):
        best = int(overlap[:, column].argmax())
        assert float(overlap[best, column]) > 0.6
        assert int(found.labels[best]) == label
