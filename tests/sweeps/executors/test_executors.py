"""The driver of a sweep and the engine of this machine: retries, orphans, shared storage, drivers that are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from cvlab.config import loading
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs import interrupt
from cvlab.runs.find import create_run, list_runs
from cvlab.runs.interrupt import StopRequest
from cvlab.sweeps import executors, scheduler
from cvlab.sweeps.executors import Limits, SubmitConfig, Task, TaskResult, node
from cvlab.sweeps.scheduler import SweepScheduler
from tests.conftest import SMALL_SWEEP, until, weights_of_trials

BEGUN = "runs/2*/trials/*/metrics.jsonl"
HOLD = (
    "import sys, time, pathlib; from cvlab.storage.lock import RunLock; RunLock(pathlib.Path(sys.argv[1])).acquire();"
)
HOLD += "print('held', flush=True); time.sleep(60)"


@pytest.fixture
def sweep(tmp_path):
    """A sweep's run directory with three trials that have not begun."""
    out = create_run(tmp_path / "runs", "s")
    for number in range(3):
        (out.path / "trials" / f"{number:03d}-lr").mkdir(parents=True)
    return out


def drive(out, engine, monkeypatch, **more):
    trials = sorted((out.path / "trials").iterdir())
    monkeypatch.setattr(executors, "get_executor", lambda chosen: engine)
    found = SweepScheduler("s", out, Limits(out.path.resolve(), 1, SubmitConfig(**more)), trials, len(trials))
    with out.locked(), StopRequest() as stop:
        found.run(stop)
    return found


def one_by_one(end):
    """Return an engine that runs one trial after the other: `end(trial)` gives the exit code."""

    def engine(take, limits, stop):
        while (task := take()) is not None:
            yield None
            yield TaskResult(task, end(task.trial), "said so")

    return engine


def finish(trial):
    (trial / "status.json").write_text('{"status": "done"}')
    return 0


@pytest.mark.parametrize("code", [1, 137, 143, -9, -11])
def test_what_may_help_is_tried_again(sweep, monkeypatch, code):
    calls = []

    def end(trial):
        calls.append(trial.name[:3])
        return finish(trial) if calls.count(trial.name[:3]) == 3 or trial.name[:3] != "001" else code

    found = drive(sweep, one_by_one(end), monkeypatch)
    assert not found.failed
    assert calls == ["000", "001", "002", "001", "001"]
    assert found.done == 3
    assert "001-lr: said so; try 3 of 3" in (sweep.path / "log.txt").read_text()


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6, 7, 8, 130])
def test_what_would_end_the_same_is_not(sweep, monkeypatch, code):
    calls = []
    found = drive(sweep, one_by_one(lambda trial: calls.append(trial) or code), monkeypatch)
    assert len(calls) == 3
    assert found.failed["000-lr"] == (code, "said so")


def test_so_many_tries_and_no_more(sweep, monkeypatch):
    calls = []
    found = drive(sweep, one_by_one(lambda trial: calls.append(trial) or 137), monkeypatch, retries=1)
    assert len(calls) == 6
    assert len(found.failed) == 3


@contextlib.contextmanager
def held(trial):
    command = [sys.executable, "-c", HOLD, str(trial)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}) as run:
        try:
            run.stdout.readline()
            yield run
        finally:
            run.kill()


def test_a_trial_that_an_orphan_still_runs_comes_last(sweep, monkeypatch):
    order = []
    with held(sweep.path / "trials" / "000-lr") as orphan:

        def end(trial):
            order.append(trial.name[:3])
            if len(order) == 2:
                orphan.kill()
                orphan.wait()
            return finish(trial)

        drive(sweep, one_by_one(end), monkeypatch)
    assert order == ["001", "002", "000"]


@pytest.mark.parametrize("ends", [True, False])
def test_where_orphans_run_all_that_is_left_the_driver_waits(sweep, monkeypatch, ends):
    begun = []
    for name in ("001-lr", "002-lr"):
        finish(sweep.path / "trials" / name)
    with held(sweep.path / "trials" / "000-lr") as orphan:

        def nap(seconds):
            if ends:
                finish(sweep.path / "trials" / "000-lr")
            orphan.kill()
            orphan.wait()

        monkeypatch.setattr(scheduler.time, "sleep", nap)
        assert drive(sweep, one_by_one(lambda trial: begun.append(trial) or finish(trial)), monkeypatch).done == 3
    assert len(begun) == (0 if ends else 1)
    assert "waiting for 1 that are still running from an earlier start" in (sweep.path / "log.txt").read_text()


def test_the_last_words_of_a_trial(tmp_path):
    (tmp_path / executors.ERRORS).write_text("Traceback\nerror: no more\n")
    assert executors.read_last_error(tmp_path) == "no more"
    assert executors.read_last_error(tmp_path) == ""


def test_a_node_that_does_not_share_the_disk_gets_no_trial(sweep, monkeypatch):
    monkeypatch.setattr(node, "STORAGE_TIMEOUT_SECONDS", 0.0)
    task = Task(sweep.path / "trials" / "000-lr", "word")
    assert not node.shares_storage(task)
    (sweep.path / executors.TOKEN).write_text("the word of a later driver")
    code, said = node.run(node.remote_task(task))
    assert code is None
    assert f"does not see the files of the sweep in {sweep.path}" in said
    (sweep.path / executors.TOKEN).write_text("word")
    assert node.shares_storage(task)

    def engine(take, limits, stop):
        yield node.task_result(take(), (None, said))

    with pytest.raises(RunDirError, match=r"does not see .* storage that all nodes share, with --runs-dir"):
        drive(sweep, engine, monkeypatch)


def test_what_a_node_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CVLAB_DATA", "/data")
    told = node.remote_task(Task(tmp_path, "word"))
    assert told.environment["CVLAB_DATA"] == "/data"
    assert not set(told.environment) & {"PATH", "HOME"}


@pytest.mark.parametrize("variable", [interrupt.STOP_WITH_INPUT, "OTHER"])
def test_a_process_stops_when_the_other_end_of_its_input_dies(variable):
    code = (
        "import time; from cvlab.runs import interrupt as i; i.stop_with_input(); print(1, flush=True); time.sleep(1.5)"
    )
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path), variable: "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        process.stdout.readline()
        process.stdin.close()
        assert process.wait() == (-signal.SIGTERM if variable == interrupt.STOP_WITH_INPUT else 0)


@pytest.mark.parametrize(("package", "extra"), [("ray", "ray"), ("submitit", "slurm"), ("optuna", "optuna")])
def test_an_extra_that_is_not_there_is_one_line(cvlab, tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    space = "search: {algorithm: optuna, trials: 3, space: {reg: {low: 0.0, high: 1.0}}}\n"
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP.partition("grid")[0] + space)
    where = [] if extra == "optuna" else ["--on", extra, *(["--address", "local"] if extra == "slurm" else [])]
    code, _, err = cvlab("sweep", "s.yaml", *where)
    assert code == 2
    assert err.splitlines()[-1] == f"error: {package} is not installed; pip install -e '.[{extra}]'"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"submit.on": "spark"}, "submit.on: expected local | ray | slurm, got"),
        ({"submit.gpu": 1}, "unknown key 'submit.gpu'; did you mean 'gpus'"),
        ({"submit.gpus": 1}, "gpus requires on: ray or slurm"),
        ({"submit.address": "auto"}, "address requires on: ray or slurm"),
        ({"submit.on": "ray", "submit.address": "there"}, "expected host:port or auto, got 'there'"),
        ({"submit.on": "slurm", "submit.address": "auto"}, "slurm has none but `local`, got 'auto'"),
        ({"submit.on": "ray", "base.duration.seconds": 3}, "a budget in duration.seconds must run one at a time"),
    ],
)
def test_mistakes(tmp_path, words, message):
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    with pytest.raises(ConfigError) as refused:
        loading.load("s.yaml", [f"{key}={value}" for key, value in words.items()])
    assert any(message in str(error) for error in (refused.value, *refused.value.further_errors)), refused.value


def test_where_it_runs_is_no_part_of_a_sweep(cvlab, tmp_path):
    words = ("sweep", "s.yaml", "base.duration.steps=2", "base.data.num_train=100", "-q")
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    assert cvlab(*words)[0] == 0
    run = (tmp_path / "runs" / "latest").resolve()
    (run / "status.json").write_text('{"status": "interrupted", "experiment": "sweep"}')
    assert cvlab(*words, "--workers", 2, "submit.retries=0")[0] == 0
    assert len(list_runs(tmp_path / "runs")) == 1
    assert not (run / executors.TOKEN).exists()
    again = loading.load(str(run)).config
    assert (again.workers, again.submit.retries) == (2, 0)


@pytest.mark.slow
def test_a_driver_that_is_killed_costs_less_than_half_a_sweep(started_sweep, tmp_path):
    words = ("base.duration.steps=2500", "seeds=[0,1]")
    began = time.monotonic()
    assert started_sweep(*words).wait() == 0
    undisturbed, wanted = time.monotonic() - began, weights_of_trials(tmp_path)
    began = time.monotonic()
    process = started_sweep(*words, "--fresh")
    until(lambda: len(list(tmp_path.glob(BEGUN))) == 7)
    process.kill()
    process.wait()
    assert started_sweep(*words).wait() == 0
    disturbed = time.monotonic() - began
    said = (tmp_path / "said.txt").read_text()
    assert weights_of_trials(tmp_path) == wanted
    assert "already running" not in said
    assert "2 already done" in said
    assert disturbed <= 1.5 * undisturbed, (disturbed, undisturbed)
