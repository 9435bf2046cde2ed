"""`trackers:` of a run in progress: separate processes that can neither stop the run nor slow it down."""

import os
import sys
import time
from pathlib import Path

import pytest

import cvlab
from cvlab.api import live_trackers, track
from cvlab.api.live_trackers import LiveTrackers
from cvlab.engine.config import TrainConfig
from cvlab.errors import ConfigError
from cvlab.runs.run_dir import RunDir
from tests import tiny

SCRIPTS = {
    "tensorboard": "print('some output'); print('tensorboard --logdir here')",
    "mlflow": "import sys; print('a warning'); sys.exit('error: the disk of mlflow is full')",
    "wandb": "import time; time.sleep(600)",
    "trackio": "import os; os.abort()",
}


def test_each_tracker_logs_one_line_and_none_stops_the_run(tmp_path, monkeypatch):
    executable = tmp_path / "python"  # called with `-m cvlab track RUN --to NAME --follow`
    cases = "\n".join(f'{name}) exec {sys.executable} -c "{code}";;' for name, code in SCRIPTS.items())
    executable.write_text(f"#!/bin/sh\ncase $6 in\n{cases}\nesac\n")
    executable.chmod(0o755)
    monkeypatch.setattr(live_trackers.sys, "executable", str(executable))
    monkeypatch.setattr(live_trackers, "WAIT_SECONDS", 3.0)
    path = tmp_path / "run"
    path.mkdir()
    trackers = LiveTrackers(RunDir(path), tuple(SCRIPTS))
    processes = [tracker.process for tracker in trackers.processes]
    assert os.getpriority(os.PRIO_PROCESS, processes[2].pid) == 19  # from its start on
    session = Path(f"/proc/{processes[2].pid}/autogroup")
    assert not session.is_file() or session.read_text().split()[-1] in ("19", "")
    start = time.monotonic()
    trackers.finish(has_ended=True)
    assert time.monotonic() - start < 30
    assert all(process.poll() is not None for process in processes)
    lines = [line.split(" ", 1)[1] for line in (path / "log.txt").read_text().splitlines()]
    assert lines == [
        "tensorboard: tensorboard --logdir here",
        "warning: tracker mlflow: the disk of mlflow is full; `cvlab track run --to mlflow` logs the run again",
        "warning: tracker wandb: it has not finished and was stopped; `cvlab track run --to wandb` logs the run again",
        "warning: tracker trackio: it ended with code -6; `cvlab track run --to trackio` logs the run again",
    ]


def test_a_tracker_that_cannot_start_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(live_trackers.sys, "executable", str(tmp_path / "nothing"))
    trackers = LiveTrackers(RunDir(tmp_path), ["tensorboard"])
    trackers.finish(has_ended=False)
    assert "warning: tracker tensorboard: [Errno 2]" in (tmp_path / "log.txt").read_text()
    assert LiveTrackers(RunDir(tmp_path, writable=False), ["tensorboard"]).processes == []


def test_a_tracker_that_is_not_installed_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(track.Trackio, "package", "not_there_at_all")
    with pytest.raises(ConfigError, match=r"trackio is not installed; pip install -e '\.\[trackio\]'"):
        cvlab.train("quickstart", {"trackers": ["trackio"]}, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_trackers_have_the_names_of_the_command_and_do_not_change_the_digest():
    assert set(TrainConfig.model_fields["trackers"].annotation.__args__[0].__args__) == set(track.TRACKERS)
    assert tiny.settings(trackers=("wandb",)).digest() == tiny.settings().digest()
    with pytest.raises(ValueError, match="names each tracker once"):
        tiny.settings(trackers=("wandb", "wandb"))


@pytest.mark.slow
def test_tensorboard_while_a_run_is_in_progress(tmp_path):
    pytest.importorskip("tensorboard")
    settings = {"data.num_train": 60, "batch_size": 20, "duration": {"steps": 6}, "expect": [], "evaluate_test": False}
    run = cvlab.train("quickstart", {**settings, "trackers": ["tensorboard"]}, runs_dir=tmp_path)
    assert run.status == "done"
    assert "tensorboard: tensorboard --logdir" in (run.path / "log.txt").read_text()
    assert list((run.path / "trackers" / "tensorboard").glob("events.*"))
