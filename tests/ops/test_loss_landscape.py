"""Filter-normalized directions, and the losses along them."""

import pytest
import torch
from torch import nn

from cvlab.ops import loss_landscape


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def test_filters_of_a_direction_have_the_norm_of_the_weights_and_biases_are_zero():
    model = network()
    direction = loss_landscape.random_direction(model, torch.randn)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), weight.detach().flatten(1).norm(dim=1))
        else:
            assert not direction[name].any()


def test_losses_belong_to_the_moved_weights_and_the_weights_are_restored():
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    directions = tuple(loss_landscape.random_direction(model, torch.randn) for _ in range(2))
    x = torch.randn(7, 3)
    losses = list(
        loss_landscape.losses_along(model, directions, [(0, 0), (0.5, -1)], lambda: float(model(x).square().sum()))
    )
    moved = before[0] + 0.5 * directions[0]["weight"] - directions[1]["weight"]
    expected = [(x @ w.T + before[1]).square().sum() for w in (before[0], moved)]
    assert losses == pytest.approx([float(loss) for loss in expected], rel=1e-5)
    assert all(p.equal(q) for p, q in zip(model.parameters(), before, strict=True))
