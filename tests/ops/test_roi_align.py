"""RoIAlign against a loop and against torchvision, with its gradient."""

import importlib
import math

import pytest
import torch

from cvlab import _compat
from cvlab.ops.roi_align import roi_align


def slow_roi_align(maps, boxes_xyxy, image, size, scale, samples):
    """Sample the maps point by point."""
    _, c, h, w = maps.shape
    output = torch.zeros(len(image), c, size, size, dtype=maps.dtype)

    def interpolate(plane, y, x):
        if not (-1 <= y <= h and -1 <= x <= w):
            return 0.0
        y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        fy, fx = y - y0, x - x0
        above = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
        return above * (1 - fy) + (plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx) * fy

    for r, (x1, y1, x2, y2) in enumerate((boxes_xyxy * scale - 0.5).tolist()):
        bin_height, bin_width = (y2 - y1) / size, (x2 - x1) / size
        rows, columns = (samples or max(1, math.ceil(side)) for side in (bin_height, bin_width))
        for k in range(c):
            for i in range(size):
                for j in range(size):
                    points = [
                        interpolate(
                            maps[image[r], k],
                            y1 + (i + (a + 0.5) / rows) * bin_height,
                            x1 + (j + (b + 0.5) / columns) * bin_width,
                        )
                        for a in range(rows)
                        for b in range(columns)
                    ]
                    output[r, k, i, j] = sum(points) / len(points)
    return output


def random_boxes(count, reach, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * reach
    return torch.cat([low, low + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60], 1)


class TestRoiAlign:
    @pytest.mark.parametrize("samples", [0, 1, 2])
    def test_matches_the_loop_also_outside_the_map(self, samples):
        torch.manual_seed(0)
        maps = torch.randn(2, 2, 5, 6, dtype=torch.float64)
        boxes_xyxy = torch.cat([random_boxes(5, 60) - 10, torch.tensor([[-400.0, 0, -300, 20], [5, 5, 5, 5]])])
        image = torch.tensor([0, 1, 1, 0, 1, 0, 0])
        actual = roi_align(maps, boxes_xyxy, image, 3, 1 / 16, samples)
        torch.testing.assert_close(actual, slow_roi_align(maps, boxes_xyxy, image, 3, 1 / 16, samples))

    @pytest.mark.parametrize("samples", [0, 2])
    def test_equals_torchvision_with_its_gradient(self, samples):
        _compat.torchvision()
        compiled = importlib.import_module("torchvision.ops.roi_align")._roi_align
        reference = getattr(compiled, "__wrapped__", compiled)  # not compiled, which would take a minute
        torch.manual_seed(0)
        maps = torch.randn(3, 5, 9, 11, dtype=torch.float64, requires_grad=True)
        boxes_xyxy, image = random_boxes(12, 80), torch.arange(12) % 3
        actual = roi_align(maps, boxes_xyxy, image, 3, 1 / 16, samples)
        expected = reference(maps, torch.cat([image[:, None].double(), boxes_xyxy], 1), 1 / 16, 3, 3, samples, True)
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)
        upstream = torch.randn_like(actual)
        grads = [torch.autograd.grad(out, maps, upstream)[0] for out in (actual, expected)]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=0)

    def test_gradient(self):
        torch.manual_seed(0)
        maps = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        boxes_xyxy = random_boxes(3, 20)
        assert torch.autograd.gradcheck(lambda m: roi_align(m, boxes_xyxy, torch.tensor([1, 0, 1]), 2, 1 / 8), maps)

    def test_no_boxes(self):
        maps = torch.randn(2, 3, 4, 4, requires_grad=True)
        features = roi_align(maps, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2)
        assert features.shape == (0, 3, 2, 2)
        features.sum().backward()
        assert float(maps.grad.abs().sum()) == 0


def test_boxes_are_not_rounded_to_the_bfloat16_of_the_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 4, 40, 60, generator=generator)
    boxes = torch.tensor([[701.3, 203.7, 873.9, 411.2], [257.1, 130.6, 301.4, 205.3]])
    index = torch.zeros(2, dtype=torch.int64)
    expected = roi_align(features.bfloat16().float(), boxes, index, 3, 1 / 16)
    actual = roi_align(features.bfloat16(), boxes, index, 3, 1 / 16)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.01, rtol=0.01)
