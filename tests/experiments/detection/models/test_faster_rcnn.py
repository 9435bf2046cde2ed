"""The two-stage detector: RoIAlign against a loop and torchvision, offsets, anchors, losses, what is found."""

import importlib
import math

import pytest
import torch

from cvlab import _compat
from cvlab.experiments.detection.models import faster_rcnn
from cvlab.experiments.detection.models.base import collate_targets
from cvlab.experiments.detection.models.faster_rcnn import FasterRcnn
from cvlab.ops import boxes
from cvlab.ops.roi_align import roi_align


def slow_roi_align(maps, boxes_xyxy, image, size, scale, samples):
    """Point by point."""
    _, c, h, w = maps.shape
    made = torch.zeros(len(image), c, size, size, dtype=maps.dtype)

    def at(plane, y, x):
        if not (-1 <= y <= h and -1 <= x <= w):
            return 0.0
        y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        fy, fx = y - y0, x - x0
        above = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
        return above * (1 - fy) + (plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx) * fy

    for r, (x1, y1, x2, y2) in enumerate((boxes_xyxy * scale - 0.5).tolist()):
        high, wide = (y2 - y1) / size, (x2 - x1) / size
        rows, columns = (samples or max(1, math.ceil(side)) for side in (high, wide))
        for k in range(c):
            for i in range(size):
                for j in range(size):
                    points = [
                        at(maps[image[r], k], y1 + (i + (a + 0.5) / rows) * high, x1 + (j + (b + 0.5) / columns) * wide)
                        for a in range(rows)
                        for b in range(columns)
                    ]
                    made[r, k, i, j] = sum(points) / len(points)
    return made


def some_boxes(count, reach, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * reach
    return torch.cat([low, low + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60], 1)


class TestRoiAlign:
    @pytest.mark.parametrize("samples", [0, 1, 2])
    def test_is_the_loop_also_outside(self, samples):
        torch.manual_seed(0)
        maps = torch.randn(2, 2, 5, 6, dtype=torch.float64)
        cut = torch.cat([some_boxes(5, 60) - 10, torch.tensor([[-400.0, 0, -300, 20], [5, 5, 5, 5]])])
        image = torch.tensor([0, 1, 1, 0, 1, 0, 0])
        mine = roi_align(maps, cut, image, 3, 1 / 16, samples)
        torch.testing.assert_close(mine, slow_roi_align(maps, cut, image, 3, 1 / 16, samples))

    @pytest.mark.parametrize("samples", [0, 2])
    def test_is_torchvisions_with_its_gradient(self, samples):
        _compat.torchvision()
        theirs = importlib.import_module("torchvision.ops.roi_align")._roi_align
        theirs = getattr(theirs, "__wrapped__", theirs)  # not compiled, which would take a minute
        torch.manual_seed(0)
        maps = torch.randn(3, 5, 9, 11, dtype=torch.float64, requires_grad=True)
        cut, image = some_boxes(12, 80), torch.arange(12) % 3
        mine = roi_align(maps, cut, image, 3, 1 / 16, samples)
        wanted = theirs(maps, torch.cat([image[:, None].double(), cut], 1), 1 / 16, 3, 3, samples, True)
        torch.testing.assert_close(mine, wanted, atol=1e-9, rtol=0)
        upstream = torch.randn_like(mine)
        grads = [torch.autograd.grad(out, maps, upstream)[0] for out in (mine, wanted)]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=0)

    def test_gradient(self):
        torch.manual_seed(0)
        maps = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        cut = some_boxes(3, 20)
        assert torch.autograd.gradcheck(lambda m: roi_align(m, cut, torch.tensor([1, 0, 1]), 2, 1 / 8), maps)

    def test_no_boxes(self):
        maps = torch.randn(2, 3, 4, 4, requires_grad=True)
        cut = roi_align(maps, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2)
        assert cut.shape == (0, 3, 2, 2)
        cut.sum().backward()
        assert float(maps.grad.abs().sum()) == 0


class TestParts:
    def test_offsets_come_back(self):
        anchors, wanted = some_boxes(20, 100, 1) + torch.tensor([0.0, 0, 5, 5]), some_boxes(20, 100, 2)
        wanted = wanted + torch.tensor([0.0, 0, 5, 5])
        back = faster_rcnn.decode(faster_rcnn.encode(wanted, anchors), anchors)
        torch.testing.assert_close(back, wanted)
        grown = faster_rcnn.decode(torch.full((20, 4), 100.0).double(), anchors)
        assert bool(torch.isfinite(grown).all())

    def test_anchors(self):
        made = faster_rcnn.anchors_at(torch.tensor([[8.0, 24, 16]]))[0]
        middle = (made[:, :2] + made[:, 2:]) / 2
        torch.testing.assert_close(middle, torch.tensor([[8.0, 24]]).expand(3, 2))
        torch.testing.assert_close(boxes.area(made), torch.full((3,), (6.0 * 16) ** 2))
        sides = made[:, 2:] - made[:, :2]
        torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor(faster_rcnn.ASPECT_RATIOS))

    def test_sides_of_anchors(self):
        anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [4, 0, 14, 10], [50, 50, 60, 60], [70, 70, 80, 80]])
        own = torch.tensor([[0.0, 0, 10, 10], [74, 70, 84, 80]])
        positive, negative, which = faster_rcnn.match_anchors(anchors, own)
        assert positive.tolist() == [0, 1, 4], "over 0.7, over 0.7, and the best of the second box"
        assert negative.tolist() == [3]
        assert which[positive].tolist() == [0, 0, 1]
        positive, negative, _ = faster_rcnn.match_anchors(anchors, own[:0])
        assert len(positive) == 0
        assert len(negative) == 5


def net_and_maps(n=2):
    torch.manual_seed(0)
    net = FasterRcnn([4, 6, 8], 3, width=8, hidden=16)
    return net, [torch.randn(n, c, s, s) for c, s in ((4, 16), (6, 8), (8, 4))]


class TestFasterRcnn:
    def test_proposals_are_inside_and_sorted(self):
        net, maps = net_and_maps()
        found = net(maps)
        assert found.objectness_logits.shape == (2, 3 * (256 + 64 + 16))
        assert found.size_px == 128
        for _, place in net.generate_proposals(found):
            assert 0 < len(place) <= faster_rcnn.POST_NMS_TOP_K
            assert bool((place >= 0).all())
            assert bool((place <= 128).all())
            assert float(boxes.iou(place, place).fill_diagonal_(0).max()) <= faster_rcnn.PROPOSAL_NMS_IOU

    def test_losses_by_part_and_no_object(self):
        net, maps = net_and_maps()
        nothing = collate_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2)
        losses = net.losses(net(maps), nothing, 128)
        losses["loss"].backward()
        assert all(bool(torch.isfinite(value)) for value in losses.values())
        assert losses["rpn_box_loss"].item() == losses["box_loss"].item() == 0
        something = collate_targets(
            [torch.tensor([[10.0, 10, 60, 50]]), torch.zeros(0, 4)], [torch.tensor([1]), torch.zeros(0).long()]
        )
        losses = net.losses(net(maps), something, 128)
        assert losses["box_loss"].item() > 0
        assert losses["rpn_box_loss"].item() > 0

    def test_the_same_seed_draws_the_same_regions(self):
        net, maps = net_and_maps()
        net.eval()
        some = collate_targets([torch.tensor([[10.0, 10, 60, 50]])] * 2, [torch.tensor([1])] * 2)
        values = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            values.append(net.losses(net(maps), some, 128)["loss"].item())
        assert values[0] == values[1] != values[2]

    def test_it_learns_a_picture_and_finds_it(self):
        net, maps = net_and_maps(1)
        wanted = torch.tensor([[20.0, 30, 70, 90], [80, 10, 120, 40]])
        targets = collate_targets([wanted], [torch.tensor([2, 0])])
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            net.losses(net(maps), targets, 128)["loss"].backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            found = net.postprocess(net(maps), 128, 0.3, 0.5, 100)[0]
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        overlap = boxes.iou(found.boxes_xyxy, wanted)
        for column, label in enumerate((2, 0)):
            best = int(overlap[:, column].argmax())
            assert float(overlap[best, column]) > 0.6
            assert int(found.labels[best]) == label

    def test_it_becomes_as_sure_as_whoever_drew_the_box(self):
        net, maps = net_and_maps(1)
        targets = collate_targets([torch.tensor([[20.0, 30, 70, 90]])], [torch.tensor([2])], [torch.tensor([0.4])])
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(80):
            optimizer.zero_grad()
            net.losses(net(maps), targets, 128)["loss"].backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            found = net.postprocess(net(maps), 128, 0.05, 0.5, 100)[0]
        assert int(found.labels[0]) == 2
        assert 0.25 < float(found.scores[0]) < 0.55
