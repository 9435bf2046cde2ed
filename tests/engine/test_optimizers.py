"""Optimizers and schedules by name, against torch and their formulas."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cvlab import _compat, registry
from cvlab.engine import muon, optimizers, schedules
from cvlab.errors import ConfigError

TORCH_NAMES = tuple(
    f"torch:{name}"
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
)

HAS_SCHEDULE_FREE = importlib.util.find_spec("schedulefree") is not None
NAMES = [name for name in optimizers.OPTIMIZERS.names if HAS_SCHEDULE_FREE or name not in optimizers.SCHEDULE_FREE]


@pytest.mark.parametrize("name", [*NAMES, *TORCH_NAMES])
def test_every_optimizer_lowers_a_quadratic(name):
    model = nn.Linear(3, 1)
    rates = {"lr": 1e-2, **({"bias_lr": 1e-2, "head_lr": 1e-2} if name == "muon" else {})}
    optimizer = optimizers.build_optimizer(name, model, rates)
    x, y = torch.randn(50, 3), torch.randn(50, 1)
    losses = []
    for _ in range(50):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam"])
def test_manual_optimizers_match_torch_over_many_steps_and_a_reload(name):
    torch.manual_seed(1)
    model, reference = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    reference.load_state_dict(model.state_dict())
    settings = {"lr": 1e-2, **({"momentum": 0.9} if name == "sgd" else {})}
    manual_optimizer = optimizers.build_optimizer(f"manual_{name}", model, settings)
    torch_optimizer = optimizers.build_optimizer(name, reference, settings)
    for step in range(30):
        x = torch.randn(8, 4, dtype=torch.float64)
        for module, optimizer in ((model, manual_optimizer), (reference, torch_optimizer)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        if step == 10:
            state = manual_optimizer.state_dict()
            manual_optimizer = optimizers.build_optimizer(f"manual_{name}", model, settings)
            manual_optimizer.load_state_dict(state)
    for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_muon_steps_are_orthogonal_and_those_of_other_parameters_are_nesterov_sgd():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 7)).double()
    reference = nn.Linear(8, 7).double()
    reference.load_state_dict(model[3].state_dict())
    optimizer = optimizers.build_optimizer(
        "muon", model, {"lr": 0.1, "bias_lr": 0.03, "head_lr": 0.3, "iterations": 12, "weight_decay": 0.01}
    )
    rates = {reference.weight: 0.3, reference.bias: 0.03}
    groups = [{"params": [weight], "lr": lr, "weight_decay": 0.01 / lr} for weight, lr in rates.items()]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    momentum = torch.zeros_like(model[0].weight)
    for _ in range(4):
        before = model[0].weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradient = model[0].weight.grad.clone()
        reference.weight.grad, reference.bias.grad = model[3].weight.grad.clone(), model[3].bias.grad.clone()
        optimizer.step()
        sgd.step()
        momentum = 0.6 * momentum + gradient
        u, _, v = torch.linalg.svd((gradient + 0.6 * momentum).reshape(6, -1), full_matrices=False)
        scaled = before * 6**0.5 / before.norm()
        update = ((scaled - model[0].weight.detach()) / 0.1).reshape(6, -1)
        singular = torch.linalg.svdvals(update)
        assert singular.min() > 0.65
        assert singular.max() < 1.25
        assert (update * (u @ v)).sum() / (update.norm() * (u @ v).norm()) > 0.95
    for actual, expected in zip(model[3].parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (5, 5), (1, 7)])
def test_orthogonalize_matches_torch(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = _zeropower_via_newtonschulz(matrix, muon.COEFFICIENTS, 5, 1e-7)  # in bfloat16
    torch.testing.assert_close(muon.orthogonalize(matrix, 5), expected.float(), atol=0.04, rtol=0.04)
    torch.testing.assert_close(muon.orthogonalize(matrix, 5, torch.bfloat16), expected.float(), atol=0.02, rtol=0.02)


def test_lion_equals_algorithm_2_of_its_paper():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = optimizers.build_optimizer("lion", model, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1})
    weights, momentum = model.weight.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
        gradient = model.weight.grad.clone()
        _compat.optimizer_step(optimizer)
        weights -= 0.01 * (torch.sign(0.9 * momentum + 0.1 * gradient) + 0.1 * weights)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(model.weight.detach(), weights, rtol=1e-12, atol=1e-12)


def test_adam_first_step_is_the_learning_rate():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = optimizers.build_optimizer("adam", model, {"lr": 0.25})
    (3 * model.weight.sum()).backward()
    optimizer.step()
    assert before - model.weight.item() == pytest.approx(0.25, abs=1e-6)  # bias correction makes m / sqrt(v) = 1


def test_frozen_parameters_are_not_updated():
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    assert len(optimizers.build_optimizer("sgd", model, {}).param_groups[0]["params"]) == 1


def test_nesterov_without_momentum_raises_config_error():
    with pytest.raises(ConfigError, match="momentum"):
        optimizers.build_optimizer("sgd", nn.Linear(1, 1), {"nesterov": True})


@pytest.mark.parametrize("name", schedules.SCHEDULES.names)
def test_every_schedule_stays_between_0_and_1(name):
    schedule = registry.get("schedule", name, schedules.SCHEDULES.names)
    values = [schedule((k + 0.5) / 100) for k in range(100)]
    assert all(0 <= value <= 1 for value in values)
    assert max(values) > 0.97


def test_values_of_schedules():
    assert schedules.linear(0.25) == 0.75
    assert schedules.linear(0.5, final=0.5) == 0.75
    assert schedules.cosine(0.5) == pytest.approx(0.5)
    assert schedules.cosine(1.0, final=0.1) == pytest.approx(0.1)
    assert schedules.triangle(0.1) == pytest.approx(0.5)
    assert schedules.triangle(0.6) == pytest.approx(0.5)
    assert [schedules.bend(p) for p in (0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.55, 0.1, 0.05, 0.0])
    assert schedules.polynomial(0.5) == 0.25
    assert schedules.exponential(0.5, final=0.01) == pytest.approx(0.1)
    assert [schedules.step(p) for p in (0.29, 0.3, 0.6, 0.95)] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert [schedules.cosine_restarts(p, cycles=2) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [1, 0.5, 1, 0.5, 0]
    )
    assert [schedules.cosine_restarts(p, 2, growth=3) for p in (0.125, 0.25, 0.625)] == pytest.approx([0.5, 1, 0.5])
    assert schedules.plateau(0.5, 2, factor=0.5) == 0.25
    assert [schedules.multistep(p) for p in (0.5, 0.6, 0.9)] == pytest.approx([1, 0.1, 0.01])
    assert schedules.warmed_up(1.0, 0.05, 0.1) == 0.5
    assert schedules.warmed_up(0.3, 0.5, 0.1) == 0.3
    assert math.isclose(schedules.warmed_up(0.7, 0.0, 0.0), 0.7)


@pytest.mark.parametrize("name", [*NAMES, *TORCH_NAMES])
def test_a_step_without_the_compiler_equals_a_step_of_torch(name):
    weights = []
    for step in (_compat.optimizer_step, lambda optimizer: optimizer.step()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        optimizer = optimizers.build_optimizer(name, model, {})
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().sum().backward()
            step(optimizer)
        weights.append([parameter.detach() for parameter in model.parameters()])
    for actual, expected in zip(*weights, strict=True):
        assert torch.equal(actual, expected)


def test_one_cycle_equals_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101, cycle_momentum=False)
    for step in range(101):
        # torch ends the increase at step 0.3 * total_steps - 1, which is a progress of 0.293 instead of 0.3.
        factor = schedules.one_cycle(step / 100, peak=0.293)
        assert factor == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch:adam", "did you mean 'torch:Adam'"),
        ("torch:LBFGS", "several times per step"),
        ("torch:Optimizer", "unknown optimizer"),
        ("adm", "did you mean 'adam'"),
    ],
)
def test_unknown_or_unsupported_names_of_torch_are_rejected(name, message):
    with pytest.raises(ConfigError) as error:
        optimizers.OPTIMIZERS.schema(name, Path())
    assert message in str(error.value)


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_arguments_of_torchs_optimizers_are_checked_by_their_signature(name):
    schema = optimizers.OPTIMIZERS.schema(name, Path())
    assert schema(lr=0.5).builder_arguments()["lr"] == 0.5
    for arguments in ({"lr": "fast"}, {"learning_rate": 0.1}, {"capturable": True}):
        with pytest.raises(ValidationError):
            schema(**arguments)


def test_arguments_that_torch_rejects_raise_config_error():
    for arguments in ({"lr": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ConfigError, match="torch:Adam: Invalid"):
            optimizers.build_optimizer("torch:Adam", nn.Linear(1, 1), arguments)
    with pytest.raises(ConfigError, match="only supports 2D"):
        optimizers.build_optimizer("torch:Muon", nn.Linear(1, 1), {})
