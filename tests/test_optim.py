"""Optimisers and schedules: by name, with the parameters a YAML may set, against their formulas."""

import math

import pytest
import torch
from torch import nn

from cvlab import lookup, optim
from cvlab.errors import ConfigError


@pytest.mark.parametrize("name", optim.OPTIMIZERS.names)
def test_every_optimizer_lowers_a_quadratic(name):
    model = nn.Linear(3, 1)
    made = optim.build_optimizer(name, model, {"lr": 1e-2})
    x, y = torch.randn(50, 3), torch.randn(50, 1)
    losses = []
    for _ in range(50):
        loss = (model(x) - y).square().mean()
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam"])
def test_by_hand_as_torch_does_it_over_many_steps_and_a_reload(name):
    torch.manual_seed(1)
    mine = nn.Linear(4, 3).double()
    theirs = nn.Linear(4, 3).double()
    theirs.load_state_dict(mine.state_dict())
    settings = {"lr": 1e-2, **({"momentum": 0.9} if name == "sgd" else {})}
    one, two = (optim.build_optimizer(n, m, settings) for n, m in ((f"manual_{name}", mine), (name, theirs)))
    for step in range(30):
        x = torch.randn(8, 4, dtype=torch.float64)
        for model, made in ((mine, one), (theirs, two)):
            made.zero_grad()
            model(x).square().sum().backward()
            made.param_groups[0]["lr"] = 1e-2 / (1 + step)
            made.step()
        if step == 10:
            state = one.state_dict()
            one = optim.build_optimizer(f"manual_{name}", mine, settings)
            one.load_state_dict(state)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_adam_first_step_is_the_learning_rate():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    made = optim.build_optimizer("adam", model, {"lr": 0.25})
    (3 * model.weight.sum()).backward()
    made.step()
    assert before - model.weight.item() == pytest.approx(0.25, abs=1e-6)  # bias correction makes m / sqrt(v) = 1


def test_frozen_parameters_are_left_alone():
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    assert len(optim.build_optimizer("sgd", model, {}).param_groups[0]["params"]) == 1


def test_nesterov_without_momentum_is_the_users_error():
    with pytest.raises(ConfigError, match="momentum"):
        optim.build_optimizer("sgd", nn.Linear(1, 1), {"nesterov": True})


@pytest.mark.parametrize("name", optim.SCHEDULES.names)
def test_every_schedule_stays_between_0_and_1(name):
    schedule = lookup.find("schedule", name, optim.SCHEDULES.names)
    values = [schedule((k + 0.5) / 100) for k in range(100)]
    assert all(0 <= value <= 1 for value in values) and max(values) > 0.97


def test_values_of_schedules():
    assert optim.linear(0.25) == 0.75 and optim.linear(0.5, final=0.5) == 0.75
    assert optim.cosine(0.5) == pytest.approx(0.5) and optim.cosine(1.0, final=0.1) == pytest.approx(0.1)
    assert optim.triangle(0.1) == pytest.approx(0.5) and optim.triangle(0.6) == pytest.approx(0.5)
    assert [optim.multistep(p) for p in (0.5, 0.6, 0.9)] == pytest.approx([1, 0.1, 0.01])
    assert optim.warmed_up(1.0, 0.05, 0.1) == 0.5 and optim.warmed_up(0.3, 0.5, 0.1) == 0.3
    assert math.isclose(optim.warmed_up(0.7, 0.0, 0.0), 0.7)
