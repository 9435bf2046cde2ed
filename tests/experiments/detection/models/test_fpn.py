"""The feature pyramid: shapes, shared filters, and batch norms that agree in training and evaluation."""

import torch

from cvlab.experiments.detection.models.fpn import FeaturePyramid, Tower


def test_shapes():
    pyramid = FeaturePyramid([4, 6, 8], 5)
    mixed = pyramid([torch.randn(2, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))])
    assert [tuple(m.shape) for m in mixed] == [(2, 5, 8, 8), (2, 5, 4, 4), (2, 5, 2, 2)]


def test_a_tower_gives_the_same_result_in_evaluation_and_training():
    """Maps of several resolutions have different statistics, so that a shared normalization would fit none of them."""
    torch.manual_seed(0)
    tower = Tower(6, 3, num_levels=3, depth=2)
    maps = [torch.randn(8, 6, 12, 12) * scale + shift for scale, shift in ((1, 0), (5, 2), (0.2, -1))]
    with torch.no_grad():
        for _ in range(250):
            trained = tower(maps)
        evaluated = tower.eval()(maps)
    for actual, expected in zip(evaluated, trained, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_levels_share_filters_but_not_batch_norms():
    tower = Tower(6, 3, num_levels=3, depth=2)
    convolutions = [m for m in tower.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in tower.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(convolutions) == 5
    assert len(norms) == 6
