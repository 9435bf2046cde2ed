"""Schedule-free optimizers: the average of the weights is evaluated, saved and exported."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cvlab.engine import loop, optimizers
from cvlab.engine.device import ComputeContext
from cvlab.engine.schedules import SCHEDULES
from cvlab.errors import StoppedError
from tests import tiny
from tests.engine.test_early_stopping import stop_at

CONSTANT = ("schedule=constant", "ema=null")
SHORT = ("data.num_train=100", "duration={steps: 6}", "batch_size=20", "evaluate_test=false", "expect=[]")


def test_the_average_equals_algorithm_1_and_evaluation_keeps_the_weights():
    pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    lr, beta = 0.05, 0.8
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = optimizers.build_optimizer("schedule_free_sgd", model, {"lr": lr, "momentum": beta})
    state = loop.TrainState(model, optimizer)
    batches = torch.randn(6, 8, 4, dtype=torch.float64)
    z = x = model.weight.detach().clone()
    steps = loop.fit(
        state,
        lambda model, batch: {"loss": (model(batch) - 1).square().mean()},
        lambda step: batches[step],
        lr_factor=lambda _: 1.0,
        ctx=ComputeContext(torch.device("cpu"), "float64", 1),
    )
    for step, _ in enumerate(itertools.islice(steps, 6)):
        y = ((1 - beta) * z + beta * x).requires_grad_()
        (gradient,) = torch.autograd.grad((batches[step] @ y.T - 1).square().mean(), y)
        z = z - lr * gradient
        x = x + (z - x) / (step + 1)
        before = model.weight.detach().clone()
        torch.testing.assert_close(state.eval_model.weight.detach(), x, rtol=1e-9, atol=1e-12)
        assert torch.equal(model.weight, before)
        torch.testing.assert_close(before, (1 - beta) * z + beta * x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", optimizers.SCHEDULE_FREE)
def test_a_run_resumes_bitwise(name, tmp_path):
    pytest.importorskip("schedulefree")
    schedule = SCHEDULES.schema("constant", Path())(name="constant")
    config = tiny.settings(name, ema=None, schedule=schedule)
    metrics, summary = tiny.train(tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, on_step=stop_at(9))
    resumed, resumed_summary = tiny.train(tmp_path / "stopped", config)
    assert tiny.untimed(resumed) == tiny.untimed(metrics)
    assert resumed_summary == summary
    assert summary["used_weights"] == "schedule-free average"


def test_eval_uses_the_average(cvlab):
    pytest.importorskip("schedulefree")
    code, out, err = cvlab("train", "quickstart", *SHORT, *CONSTANT, "optimizer=schedule_free_adamw", "--json")
    assert code == 0, err
    report = json.loads(out)
    code, out, err = cvlab("eval", report["run"], "--split", "val", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["val_accuracy"] == report["metrics"]["val_accuracy"]
    state = torch.load(next(Path(report["run"]).glob("checkpoints/*6.pt")), weights_only=True)
    assert any(not torch.equal(state["model"][name], average) for name, average in state["ema_model"].items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("schedule=cosine", "ema=null"), "schedule_free_sgd takes none, only warmup"),
        (("schedule=constant", "ema=0.9"), "schedule_free_sgd averages the weights itself"),
        (("schedule=constant", "ema=null", "optimizer.momentum=0"), "optimizer.momentum"),
        (CONSTANT, "schedulefree is not installed"),
    ],
)
def test_invalid_settings_are_rejected_before_the_run_directory_exists(overrides, message, cvlab, monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    code, out, err = cvlab("train", "quickstart", *SHORT, "optimizer.name=schedule_free_sgd", *overrides)
    assert code == 2
    assert message in err
    assert "run directory" not in err + out
