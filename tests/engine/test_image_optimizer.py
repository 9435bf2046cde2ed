"""Optimization of images."""

import pytest
import torch
import torch.nn.functional as F

from cvlab.engine import image_optimizer


def test_adam_equals_torch():
    torch.manual_seed(0)
    start, target = torch.rand(3, 4), torch.rand(3, 4)
    reference = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([reference], lr=0.05)
    for _ in range(7):
        optimizer.zero_grad()
        F.mse_loss(reference, target).backward()
        optimizer.step()
    state = image_optimizer.ImageState([start.clone()])
    steps = image_optimizer.optimization_steps(
        state, lambda p: {"loss": F.mse_loss(p.tensors[0], target)}, image_optimizer.adam(lambda step: 0.05)
    )
    for _ in range(7):
        next(steps)
    torch.testing.assert_close(state.tensors[0], reference.detach())
    assert state.step == 7


def test_diverges_if_the_loss_is_not_finite():
    from cvlab.errors import DivergedError

    state = image_optimizer.ImageState([torch.zeros(2)])
    steps = image_optimizer.optimization_steps(state, lambda p: {"loss": p.tensors[0].sum() / 0}, lambda p, g: None)
    with pytest.raises(DivergedError, match="not finite at step 0"):
        next(steps)
    assert state.tensors[0].equal(torch.zeros(2))
