"""The layer that produced the first value that is not finite; norms of gradients and updates."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from cvlab.engine import loop
from cvlab.engine.anomaly import AnomalyRecorder
from cvlab.engine.device import ComputeContext
from cvlab.engine.gradient_log import GradientLog
from cvlab.errors import DivergedError
from tests import tiny

CPU = ComputeContext(torch.device("cpu"), "float32", 1)


class Function(nn.Module):
    """A layer without weights."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def first_step_error(model, batch, loss=lambda x: x.square().mean()):
    """Return the message of the error in the first step."""
    state = loop.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def loss_fn(model, batch):
        return {"loss": loss(model(batch))}

    steps = loop.fit(state, loss_fn, lambda _: batch, lr_factor=lambda _: 1.0, ctx=CPU, anomaly=AnomalyRecorder(model))
    with pytest.raises(DivergedError) as error:
        next(steps)
    return error.value.message


def build_model(function):
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Function(function)), nn.Linear(4, 2))


def test_the_error_names_the_layer_of_the_forward_pass():
    assert "came from layer 1.1 (Function)" in first_step_error(build_model(lambda x: x / 0), torch.ones(3, 4))


def test_the_error_distinguishes_input_weights_and_loss():
    model = build_model(lambda x: x)
    assert "came from the input of layer 0 (Linear)" in first_step_error(model, torch.full((3, 4), math.inf))
    assert "came from the loss function" in first_step_error(model, torch.ones(3, 4), lambda x: x.mean() * math.nan)
    model[2].weight.data[0, 0] = math.nan
    assert "came from layer 2 (Linear), whose weight is not finite" in first_step_error(model, torch.ones(3, 4))


def test_a_gradient_that_is_not_finite_is_an_error_before_the_update():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Function(lambda x: (x * 0).sqrt()), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    assert first_step_error(model, torch.ones(3, 4)).startswith(
        "the gradient of weight of layer 1 (Linear) is not finite"
    )
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_norms_equal_their_definition(clip_norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    state = loop.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.5))
    batch = torch.randn(3, 4)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradients = torch.autograd.grad(model(batch).square().mean(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    steps = loop.fit(
        state,
        lambda model, batch: {"loss": model(batch).square().mean()},
        lambda _: batch,
        lr_factor=lambda _: 1.0,
        ctx=CPU,
        clip_norm=clip_norm,
        gradient_log=GradientLog(model, per_layer=True),
    )
    (losses,) = itertools.islice(steps, 1)
    assert losses["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    update = 0.5 * min(norm.item(), clip_norm or math.inf)
    assert losses["update_ratio"].item() == pytest.approx(update / weights.norm().item(), rel=1e-4)
    parts = [losses[f"grad_norm/{name}"] for name in ("0", "2")]
    assert parts[0].item() == pytest.approx(torch.cat([g.flatten() for g in gradients[:2]]).norm().item(), rel=1e-5)
    assert torch.stack(parts).norm().item() == pytest.approx(norm.item(), rel=1e-5)
    first = weights[: model[0].weight.numel() + 5].norm().item()
    ratio = losses["update_ratio/0"].item()
    assert ratio == pytest.approx(update * parts[0].item() / norm.item() / first, rel=1e-4)


def test_the_error_of_a_run_names_the_source(tmp_path, monkeypatch):
    original = tiny.job

    def broken_job(config, on_step):
        task = original(config, on_step)

        def loss_fn(model, batch):
            losses = task.loss_fn(model, batch)
            return {"loss": losses["loss"] / 0}

        return dataclasses.replace(task, loss_fn=loss_fn)

    monkeypatch.setattr(tiny, "job", broken_job)
    with pytest.raises(DivergedError, match=r"step 0 .*came from the loss function"):
        tiny.train(tmp_path / "run", tiny.settings(anomaly=True))


def test_recording_gradients_keeps_a_run_bitwise_identical(tmp_path):
    plain = tiny.train(tmp_path / "plain")[1]
    assert tiny.train(tmp_path / "observed", tiny.settings(anomaly=True, log_gradients="layers"))[1] == plain
    rows = [row for row in tiny.rows(tmp_path / "observed") if "train_loss" in row]
    names = {name for name in rows[0] if name.startswith("grad_norm/")}
    assert len(names) > 1
    assert all(row[name] > 0 for row in rows for name in names)
    for row in rows:
        assert math.hypot(*(row[name] for name in names)) == pytest.approx(row["grad_norm"], rel=0.05)


def test_from_the_command_line(cvlab):
    short = ("data.num_train=100", "duration={steps: 4}", "batch_size=20", "expect=[]", "log_gradients=layers")
    code, out, err = cvlab("train", "quickstart", *short, "anomaly=true", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert 0 < report["metrics"]["update_ratio"] < 1
    assert not [name for name in report["metrics"] if name.startswith("update_ratio/")], (
        "metrics have no values of single layers"
    )
    assert "update_ratio/" in (Path(report["run"]) / "metrics.jsonl").read_text()
    assert "grad_norm/" in (Path(report["run"]) / "report.html").read_text()
    code, _, err = cvlab("train", "quickstart", *short, "anomaly=true", "compile=true")
    assert code == 2
    assert "set compile: false" in err
