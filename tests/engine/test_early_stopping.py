"""Early stopping and the schedule `plateau`: both follow the monitored metric, and resume bitwise."""

import os
import signal

import pytest

from cvlab.engine.optimizers import OPTIMIZERS
from cvlab.engine.schedules import SCHEDULES
from cvlab.errors import ConfigError, StoppedError
from cvlab.runs import checkpoint
from tests import tiny


def component(registry, name, **arguments):
    return registry.schema(name, tiny.Path())(name=name, **arguments)


def stop_at(step):
    def on_step(current_step):
        if current_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def evaluations(path):
    return [row for row in tiny.rows(path) if "val_loss" in row]


def test_a_run_ends_after_patience_evaluations_without_improvement(tmp_path):
    full, _ = tiny.train(tmp_path / "full")
    metrics, summary = tiny.train(tmp_path / "early", tiny.settings(patience=1))
    values = [row["val_loss"] for row in evaluations(tmp_path / "full")]
    first_worse = next(k for k in range(1, len(values)) if values[k] <= max(values[:k]))
    assert metrics["steps"] == 6 * (first_worse + 1) < full["steps"]
    assert metrics["best_step"] == 6 * first_worse
    assert f"since step {6 * first_worse}" in summary["stopped_early"]
    rows = tiny.rows(tmp_path / "early")
    assert rows[-1]["step"] == metrics["steps"]
    losses = [row for row in rows if "train_loss" in row]
    assert losses[-1]["step"] == metrics["steps"], "the last losses are logged"
    assert checkpoint.steps(tmp_path / "early" / "checkpoints")[-1] == metrics["steps"]


def test_large_patience_does_not_change_a_run(tmp_path):
    assert tiny.train(tmp_path / "a")[1] == tiny.train(tmp_path / "b", tiny.settings(patience=100))[1]


@pytest.mark.parametrize("kind", ["patience", "plateau"])
def test_a_stopped_and_resumed_run_is_bitwise_identical(kind, tmp_path):
    plateau = component(SCHEDULES, "plateau", patience=1, factor=0.5)
    config = tiny.settings(patience=2, ema=None) if kind == "patience" else tiny.settings(schedule=plateau, ema=None)
    metrics, summary = tiny.train(tmp_path / "whole", config)
    for step in range(3, int(metrics["steps"]), 4):
        path = tmp_path / f"stopped-{step}"
        with pytest.raises(StoppedError):
            tiny.train(path, config, stop_at(step))
        resumed, resumed_summary = tiny.train(path, config)
        assert resumed_summary == summary
        assert tiny.untimed(resumed) == tiny.untimed(metrics)
        assert tiny.rows(path) == tiny.rows(tmp_path / "whole")


def test_resuming_a_run_that_stopped_early_does_not_train(tmp_path):
    metrics, summary = tiny.train(tmp_path, tiny.settings(patience=1))
    rows = tiny.rows(tmp_path)
    resumed, resumed_summary = tiny.train(tmp_path, tiny.settings(patience=1))
    assert (tiny.untimed(resumed), resumed_summary) == (tiny.untimed(metrics), summary)
    assert tiny.rows(tmp_path) == rows


def test_plateau_reduces_the_learning_rate_after_its_patience(tmp_path):
    schedule = component(SCHEDULES, "plateau", patience=1, factor=0.5)
    tiny.train(tmp_path, tiny.settings(schedule=schedule, warmup=0.0, ema=None, log_every=6))
    rows = tiny.rows(tmp_path)
    best, factor = -1.0, 1.0
    for row in rows:
        if "lr" in row and row["step"] % 6 == 0:
            assert row["lr"] == pytest.approx(1e-2 * factor)
        if "val_loss" in row:
            factor *= 0.5 if row["val_loss"] <= best else 1.0
            best = max(best, row["val_loss"])
    assert factor < 1


@pytest.mark.parametrize("name", ["torch:Adafactor", "torch:NAdam", "torch:ASGD", "torch:Rprop"])
def test_optimizers_of_torch_resume_bitwise(name, tmp_path):
    config = tiny.settings(optimizer="sgd").model_copy(update={"optimizer": component(OPTIMIZERS, name, lr=1e-3)})
    _, summary = tiny.train(tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, stop_at(13))
    assert tiny.train(tmp_path / "stopped", config)[1] == summary


@pytest.mark.parametrize("override", ["patience=2", "schedule=plateau"])
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_patience_and_plateau_without_a_validation_split_are_rejected(override, flags, cvlab):
    code, _, err = cvlab("train", "quickstart", override, "data.val_fraction=0", *flags)
    assert code == ConfigError.code
    assert "no validation split" in err
    assert "raise data.val_fraction" in err
