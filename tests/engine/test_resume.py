"""A run that is stopped and resumed ends bit-for-bit identical, with the same rows and metrics."""

import math
import os
import shutil
import signal
import time

import pytest
import torch

from cvlab.config import strict_yaml
from cvlab.engine import checkpointer
from cvlab.engine.trainer import Trainer
from cvlab.errors import CheckpointError, StoppedError
from cvlab.runs import checkpoint
from tests import tiny


def stop_at(step):
    def on_step(current_step):
        if current_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def uninterrupted(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    config = tiny.settings(request.param)
    metrics, summary = tiny.train(path, config)
    return config, metrics, summary, tiny.rows(path)


@pytest.mark.parametrize(
    "stride", [5, pytest.param(1, marks=pytest.mark.slow)]
)  # 5: any position in an epoch of 6 steps
def test_resume_from_every_step_is_bitwise_equal(uninterrupted, tmp_path, stride):
    config, metrics, summary, rows = uninterrupted
    for step in range(0, tiny.STEPS, stride):
        path = tmp_path / f"stopped-{step}"
        with pytest.raises(StoppedError) as error:
            tiny.train(path, config, stop_at(step))
        assert error.value.code == 143
        assert checkpoint.steps(path / "checkpoints")[-1] == step + 1, "the step in progress is saved"
        resumed, resumed_summary = tiny.train(path, config)
        assert resumed_summary == summary, f"stopped after step {step + 1}"
        assert tiny.untimed(resumed) == tiny.untimed(metrics)
        assert tiny.rows(path) == rows


def test_runs_with_different_seeds_differ(tmp_path):
    _, first = tiny.train(tmp_path / "a", tiny.settings(seed=1))
    _, second = tiny.train(tmp_path / "b", tiny.settings(seed=2))
    assert first != second


STATE_KEYS = [
    "step",
    "model",
    "optimizer",
    "ema_model",
    "scaler",
    "rng",
    "format",
    "progress",
    "extra_state",
    "extra_state.losses",
    "extra_state.losses_at_epoch_start",
    "metrics_bytes",
    "config_sha256",
    "fingerprint",
    "fingerprint.processes",
    "other_ranks",
    "uses_ema",
    "inputs",
    "rng.torch",
    "rng.numpy",
    "rng.python",
    "rng.cuda",
    "progress.total_steps",
    "progress.plan_history",
    "progress.budget_seconds",
    "progress.train_seconds",
    "progress.loss_sums",
    "progress.epoch_loss_sums",
    "progress.epoch_loss_steps",
    "progress.epoch_losses",
    "progress.loss_steps",
    "progress.best_value",
    "progress.best_step",
    "progress.metrics",
    "progress.stale_evaluations",
    "progress.stale_evaluations_at_lr",
    "progress.lr_reductions",
    "progress.stop_reason",
    "fingerprint.device",
    "fingerprint.precision",
    "fingerprint.threads",
    "fingerprint.torch",
    "fingerprint.cvlab",
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    path = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(StoppedError):
        tiny.train(path, tiny.settings(), stop_at(13))
    return path


@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_checkpoint_without_a_key_is_rejected(key, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for step in checkpoint.steps(folder):
        state = checkpoint.load(checkpoint.path_of(folder, step))
        block = state
        *parents, last = key.split(".")
        for part in parents:
            block = block[part]
        assert last in block
        del block[last]
        checkpoint.write(checkpoint.path_of(folder, step), state)
    with pytest.raises(CheckpointError, match="lacks"):
        tiny.train(tmp_path / "run")


def test_every_key_of_the_state_is_tested(stopped):
    _, state = checkpoint.load_latest(stopped / "checkpoints", print)
    assert set(state) <= set(STATE_KEYS)
    nested = {f"{block}.{key}" for block in ("rng", "progress", "fingerprint", "extra_state") for key in state[block]}
    assert nested <= set(STATE_KEYS)


def test_a_resumed_budget_and_a_run_of_its_recorded_plan_give_the_same_result(tmp_path):
    def slower(step):
        time.sleep(0.002 if step < 12 else 0.006)

    def stop_slower(step):
        slower(step)
        stop_at(20)(step)

    config = tiny.settings(duration={"seconds": 1.0})
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "run", config, stop_slower)
    metrics, summary = tiny.train(tmp_path / "run", config, slower)
    recorded = strict_yaml.read(tmp_path / "run" / "config.yaml").value["duration"]
    assert recorded["plan_history"]
    assert recorded["steps"] == metrics["steps"]
    assert recorded["seconds"] is None
    config_of_record = tiny.settings(duration={key: value for key, value in recorded.items() if value})
    again, repeated_summary = tiny.train(tmp_path / "again", config_of_record)
    assert repeated_summary == summary
    assert tiny.rows(tmp_path / "again") == tiny.rows(tmp_path / "run")
    assert tiny.untimed(again) == tiny.untimed(metrics)
    tiny.train(tmp_path / "run", config_of_record)  # like after a kill before the status `done` is written


def test_a_changed_configuration_is_not_resumed(tmp_path):
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "run", tiny.settings(), stop_at(5))
    with pytest.raises(CheckpointError, match=r"config\.yaml was changed"):
        tiny.train(tmp_path / "run", tiny.settings(clip_norm=2.0))


def test_a_changed_fingerprint_is_logged(tmp_path):
    torch.set_num_threads(2)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "run", tiny.settings(threads=None), stop_at(5))
    torch.set_num_threads(1)
    tiny.train(tmp_path / "run", tiny.settings(threads=None))
    assert "threads was 2, is 1: the result is not bitwise" in (tmp_path / "run" / "log.txt").read_text()


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(StoppedError):
        tiny.train(path, tiny.settings(), stop_at(13))
    newest = checkpoint.path_of(path / "checkpoints", 14)
    newest.write_bytes(newest.read_bytes()[:-100])
    _, summary = tiny.train(path)
    assert summary == tiny.train(tmp_path / "other")[1]
    assert "step_000000014.pt: damaged" in (path / "log.txt").read_text()


def test_best_is_linked_when_resuming_after_a_kill_before_the_link(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(StoppedError):
        tiny.train(path, tiny.settings(eval_every=1), stop_at(5))
    folder = path / "checkpoints"
    state = checkpoint.load(checkpoint.load_latest(folder, print)[0])
    state["progress"]["best_step"], state["progress"]["best_value"] = state["step"], 0.0
    checkpoint.write(checkpoint.path_of(folder, state["step"]), state)
    tiny.train(path, tiny.settings(eval_every=1), lambda step: None)
    assert checkpoint.load(folder / checkpoint.BEST)["step"] >= state["step"]


def test_a_run_resumes_from_the_best_checkpoint_if_no_other_is_valid(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(StoppedError):
        tiny.train(path, tiny.settings(), stop_at(13))
    folder = path / "checkpoints"
    newest = checkpoint.path_of(folder, checkpoint.steps(folder)[-1])
    (folder / checkpoint.BEST).unlink(missing_ok=True)
    (folder / checkpoint.BEST).write_bytes(newest.read_bytes())
    for step in checkpoint.steps(folder):
        checkpoint.path_of(folder, step).write_bytes(b"")
    _, summary = tiny.train(path)
    assert summary == tiny.train(tmp_path / "other")[1]


def test_a_run_without_a_valid_checkpoint_is_not_restarted(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(StoppedError):
        tiny.train(path, tiny.settings(), stop_at(13))
    for step in checkpoint.steps(path / "checkpoints"):
        checkpoint.path_of(path / "checkpoints", step).write_bytes(b"")
    with pytest.raises(CheckpointError, match="all checkpoints are damaged") as error:
        tiny.train(path)
    assert error.value.code == 7


def test_checkpoints_are_spaced_by_their_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer, "MAX_CHECKPOINT_OVERHEAD", math.inf)
    tiny.train(tmp_path / "often", tiny.settings(save_seconds=0.0))
    assert checkpoint.steps(tmp_path / "often" / "checkpoints") == [31, 32]
    tiny.train(tmp_path / "seldom", tiny.settings())
    assert checkpoint.steps(tmp_path / "seldom" / "checkpoints")[-1] == 32


def test_the_last_weights_are_used_if_they_are_better_than_the_average(tmp_path, monkeypatch):
    scores = {}

    def evaluate(trainer):
        original = trainer.task.evaluate

        def evaluate_with_score(model):
            is_average = model is trainer.state.ema_model
            return original(model) | {"val_accuracy": scores["average" if is_average else "last"]}

        return evaluate_with_score

    original_begin = Trainer.begin

    def begin(trainer):
        object.__setattr__(trainer.task, "evaluate", evaluate(trainer))
        object.__setattr__(trainer.task, "monitor", "val_accuracy")
        original_begin(trainer)

    monkeypatch.setattr(Trainer, "begin", begin)
    digests = {}
    for name, average, last in (("a", 0.5, 0.9), ("b", 0.9, 0.5)):
        scores |= {"average": average, "last": last}
        metrics, _ = tiny.train(tmp_path / name, tiny.settings())
        assert metrics["val_accuracy"] == 0.9
        state = checkpoint.load(checkpoint.path_of(tmp_path / name / "checkpoints", tiny.STEPS))
        assert state["uses_ema"] is (average > last)
        used = state["ema_model"] if average > last else state["model"]
        digests[name] = checkpoint.weights_digest(used)
        log = (tmp_path / name / "log.txt").read_text()
        assert ("the last weights are used" in log) is (last > average)
    assert digests["a"] != digests["b"]


def test_the_train_loss_does_not_depend_on_log_every(tmp_path):
    every_step, *less_often = (
        tiny.train(tmp_path / str(n), tiny.settings(log_every=n))[0]["train_loss"] for n in (1, 3, 50)
    )
    assert less_often == [every_step, every_step]
