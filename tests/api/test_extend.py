"""`cvlab resume RUN key=value`: a new run that continues another one, which does not change."""

import json
import shutil

import pytest

import cvlab as cvlab_library
from cvlab.api import extend
from cvlab.errors import CheckpointError, ConfigError, RunDirError
from cvlab.runs import checkpoint
from cvlab.runs.find import find_run
from cvlab.runs.records import read_summary

SETTINGS = {
    "data.num_train": 60,
    "batch_size": 20,
    "schedule": "constant",
    "expect": [],
    "evaluate_test": False,
    "threads": 1,
    "ema": 0.5,
    "eval_batch_size": 1000,
}


def content(path):
    """Return the bytes of all files of a run directory except its lock."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "run.lock"]
    return {file.relative_to(path): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory, data_root):
    """Return a finished run of one epoch, three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLAB_DATA", str(data_root))
        patch.setenv("CVLAB_OFFLINE", "1")
        return cvlab_library.train(
            "quickstart", {**SETTINGS, "duration.epochs": 1}, runs_dir=tmp_path_factory.mktemp("runs")
        )


def test_an_extended_run_is_bitwise_identical_to_a_longer_run(source, cvlab, tmp_path):
    before = content(source.path)
    code, out, err = cvlab("resume", source.path, "duration.epochs=2", "--json")
    assert code == 0, err
    run = json.loads(out)
    longer = cvlab_library.train("quickstart", {**SETTINGS, "duration.epochs": 2})
    summary = read_summary(find_run(run["run"], tmp_path))
    assert summary["weights_sha256"] == longer.summary["weights_sha256"]
    assert summary["metrics"]["steps"] == 6
    assert summary["metrics"]["val_accuracy"] == longer.summary["metrics"]["val_accuracy"]
    assert summary["continues"] == run["continues"] == {"run": source.name, "step": 3}
    assert content(source.path) == before
    page = (find_run(run["run"], tmp_path) / "report.html").read_text()
    assert f"continues {source.name} at step 3" in page
    assert f"continues {source.name} at step 3" in cvlab("show", run["run"])[1]


def test_resuming_a_finished_run_without_overrides_only_reports_it(source, cvlab):
    before = content(source.path)
    code, _, err = cvlab("resume", source.path)
    assert code == 0
    assert "nothing to resume" in err
    assert content(source.path) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["duration.epochs=1"], "has these values already"),
        (["optimizer.lr=1e-3"], "has taken 3 steps, the duration is 3"),
        (["duration.steps=2"], "has taken 3 steps, the duration is 2"),
        (["duration.seconds=9"], "duration.seconds: a run is continued up to a number of steps"),
        (["duration.epochs=2", "seed=5"], "seed cannot change when a run is continued"),
        (["duration.epochs=2", "model.filters=[4, 4, 4]"], r"model.filters cannot change"),
        (["duration.epochs=2", "data.val_fraction=0.5"], "data.val_fraction cannot change"),
        (["duration.epochs=2", "optimizer=sgd", "optimizer.lr=1"], "optimizer.name cannot change"),
        (["duration.epochs=2", "batch_size=10"], "batch_size cannot change"),
        (["duration.epoch=2"], "unknown key 'duration.epoch'"),
        (["duration.epochs=two"], "expected a whole number"),
    ],
)
def test_an_override_that_cannot_change_is_a_one_line_error_and_writes_nothing(
    source, cvlab, tmp_path, overrides, message
):
    before = content(source.path)
    code, _, err = cvlab("resume", source.path, *overrides)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert content(source.path) == before
    assert not (tmp_path / "runs").exists()


def test_the_run_comes_first_and_a_dry_run_writes_nothing(source, cvlab, tmp_path):
    code, _, err = cvlab("resume", "duration.epochs=2")
    assert code == 2
    assert "cvlab resume latest duration.epochs=2" in err
    code, out, _ = cvlab("resume", source.path, "duration.steps=8", "optimizer.lr=1e-4", "--dry-run", "--json")
    plan = json.loads(out)
    assert (plan["step"], plan["total_steps"], plan["optimizer.lr"]) == (3, 8, 1e-4)
    assert not (tmp_path / "runs").exists()


def test_extending_from_python_with_a_lower_learning_rate_and_extending_again(source, tmp_path):
    run = source.resume({"duration.steps": 4, "optimizer.lr": 1e-4, "name": "slower"})
    assert [row["lr"] for row in run.rows if "lr" in row] == [2e-3, 1e-4]
    assert "-slower-" in run.name
    assert [row["step"] for row in run.rows if "val_accuracy" in row] == [3, 4]
    assert run.environment["provenance"]["duration.steps"] == "command line"
    # A run that is killed before its first step can be extended too.
    path = extend.create(extend.prepare(run.path, ["duration.steps=5"]), tmp_path / "runs")
    again = cvlab_library.load_run(path)
    assert again.environment["continues"] == {"run": run.name, "step": 4, "changed": {"duration.steps": 5}}
    assert checkpoint.steps(path / "checkpoints") == [4]


def test_a_running_or_damaged_run_cannot_be_extended(source, tmp_path, monkeypatch):
    path = tmp_path / "copy"
    shutil.copytree(source.path, path)
    with monkeypatch.context() as patch:
        patch.setattr(extend, "is_held", lambda path: True)
        with pytest.raises(RunDirError, match="copy: running"):
            extend.prepare(path, ["duration.epochs=2"])
    for file in (path / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        extend.prepare(path, ["duration.epochs=2"])


def test_early_stopping_and_the_choice_of_the_weights_start_over(source):
    state = checkpoint.load_latest(source.path / "checkpoints", print)[1]
    state["progress"] |= {"stop_reason": "val_accuracy has not improved", "stale_evaluations": 3, "best_step": 3}
    state["uses_ema"] = False
    extension = extend.prepare(source.path, ["duration.epochs=2"])
    extend._continue(state, extension.config, 6, {"patience": 5})
    extend._use_ema_again(state)
    progress = state["progress"]
    assert (progress["stop_reason"], progress["stale_evaluations"]) == ("", 0)
    assert (progress["best_step"], progress["best_value"], state["uses_ema"]) == (0, None, True)


@pytest.mark.parametrize(
    ("before", "after", "step", "totals", "message"),
    [
        ({"finetune_epochs": 2}, {"finetune_epochs": 2}, 40, (40, 60), "finetune_epochs=4 continues"),
        ({"finetune_epochs": 2}, {"finetune_epochs": 4}, 40, (40, 60), None),
        ({"finetune_epochs": 0}, {"finetune_epochs": 2}, 40, (40, 60), "cannot change from 0 to 2"),
        ({"reward_epochs": 0}, {"reward_epochs": 2}, 40, (40, 60), None),
        ({"reward_epochs": 0}, {"reward_epochs": 3}, 40, (40, 60), "reward_epochs=2 continues"),
        ({"finetune_epochs": 2}, {"finetune_epochs": 2}, 15, (40, 60), None),
        ({}, {}, 40, (40, 60), None),
    ],
)
def test_the_final_epochs_cannot_move(before, after, step, totals, message):
    if message is None:
        extend._require_same_phases(before, after, step, totals, lambda: 10)
        return
    with pytest.raises(ConfigError) as error:
        extend._require_same_phases(before, after, step, totals, lambda: 10)
    assert message in str(error.value)
