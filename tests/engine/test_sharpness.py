"""Sharpness-aware minimization against a plain implementation of its algorithm."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.engine import loop, optimizers, sharpness
from cvlab.engine.device import ComputeContext
from cvlab.errors import DivergedError, StoppedError
from tests import tiny
from tests.engine.test_early_stopping import stop_at

CPU64 = ComputeContext(torch.device("cpu"), "float64", 1)
RADIUS, LR, MOMENTUM, CLIP_NORM = 0.3, 0.1, 0.9, 0.5


def build_model(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 3)).double()


def get_batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(12, 4, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 3, (12,), generator=generator)


def loss_fn(model, batch):
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


def split_batch(batch):
    return list(zip(*(part.chunk(3) for part in batch), strict=True))


def fit(model, steps, **options):
    state = loop.TrainState(model, optimizers.build_optimizer("sgd", model, {"lr": LR, "momentum": MOMENTUM}))
    steps = itertools.islice(
        loop.fit(
            state, loss_fn, get_batch, lr_factor=lambda _: 1.0, ctx=CPU64, clip_norm=CLIP_NORM, sam=RADIUS, **options
        ),
        steps,
    )
    return [losses["loss"].item() for losses in steps]


@pytest.mark.parametrize("options", [{}, {"split_batch": split_batch}], ids=["whole", "parts"])
def test_a_step_equals_algorithm_1(options):
    model, reference = build_model(), build_model()
    losses = fit(model, 4, **options)
    weights = [parameter.detach().clone() for parameter in reference.parameters()]
    velocity = [torch.zeros_like(weight) for weight in weights]

    def gradient_at(values, batch):
        for parameter, value in zip(reference.parameters(), values, strict=True):
            parameter.data.copy_(value)
        loss = loss_fn(reference, batch)["loss"]
        return loss.item(), torch.autograd.grad(loss, list(reference.parameters()))

    for step in range(4):
        loss, gradient = gradient_at(weights, get_batch(step))
        assert losses[step] == pytest.approx(loss, rel=1e-12), "the loss at the unperturbed weights"
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        _, gradient = gradient_at(
            [w + RADIUS * g / norm for w, g in zip(weights, gradient, strict=True)], get_batch(step)
        )
        scale = min(1.0, CLIP_NORM / (torch.cat([g.flatten() for g in gradient]).norm().item() + 1e-6))
        velocity = [MOMENTUM * v + scale * g for v, g in zip(velocity, gradient, strict=True)]
        weights = [w - LR * v for w, v in zip(weights, velocity, strict=True)]
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-9, atol=1e-12)


def test_statistics_of_batchnorm_are_those_of_the_unperturbed_weights():
    model, reference = build_model(nn.BatchNorm1d(8)), build_model(nn.BatchNorm1d(8))
    fit(model, 1)
    reference.train()(get_batch(0)[0])
    for buffer, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("value", [1.0, 0.0, float("inf"), float("nan")])
def test_the_weights_are_restored_exactly_and_the_gradient_is_not_reset(value):
    model = build_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    model[0].bias.grad = None
    with sharpness.perturbed(model, list(model.parameters()), RADIUS):
        offsets = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        distance = torch.cat([offset.flatten() for offset in offsets]).norm().item()
        model[0].weight.grad = torch.ones_like(model[0].weight)
    assert distance == pytest.approx(RADIUS if value == 1.0 else 0.0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert model[0].weight.grad.eq(1).all()


def test_a_loss_that_is_not_finite_at_the_perturbed_weights_leaves_the_weights_unchanged():
    model = build_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def break_second_pass(model, batch):
        calls.append(None)
        losses = loss_fn(model, batch)
        return losses if len(calls) == 1 else {"loss": losses["loss"] * float("nan")}

    calls = []
    state = loop.TrainState(model, optimizers.build_optimizer("sgd", model, {"lr": LR}))
    steps = loop.fit(state, break_second_pass, get_batch, lr_factor=lambda _: 1.0, ctx=CPU64, sam=RADIUS)
    with pytest.raises(DivergedError, match="step 0"):
        next(steps)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_run_resumes_bitwise(tmp_path):
    config = tiny.settings(sam=0.05)
    metrics, summary = tiny.train(tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, on_step=stop_at(5))
    resumed, resumed_summary = tiny.train(tmp_path / "stopped", config)
    assert tiny.untimed(resumed) == tiny.untimed(metrics)
    assert resumed_summary == summary
    assert summary != tiny.train(tmp_path / "plain")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("quickstart", "skip_easy=0.5"), "skip_easy would compare the losses of the moved weights"),
        (("caption_scenes", "reward_epochs=1"), "reward_epochs samples other captions"),
    ],
)
def test_features_that_depend_on_a_single_pass_are_rejected(args, message, cvlab):
    code, _, err = cvlab("train", *args, "sam=0.05", "--dry-run")
    assert code == 2
    assert message in err
