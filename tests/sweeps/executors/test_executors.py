"""The scheduler of a sweep and the local executor: retries, orphans, shared storage, killed schedulers."""

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

METRICS_FILES = "runs/2*/trials/*/metrics.jsonl"
HOLD = (
    "import sys, time, pathlib; from cvlab.storage.lock import RunLock; RunLock(pathlib.Path(sys.argv[1])).acquire();"
)
HOLD += "print('held', flush=True); time.sleep(60)"


@pytest.fixture
def sweep(tmp_path):
    """Return the run directory of a sweep with three trials that have not started."""
    run = create_run(tmp_path / "runs", "s")
    for number in range(3):
        (run.path / "trials" / f"{number:03d}-lr").mkdir(parents=True)
    return run


def run_scheduler(run, executor, monkeypatch, **options):
    trials = sorted((run.path / "trials").iterdir())
    monkeypatch.setattr(executors, "get_executor", lambda config: executor)
    limits = Limits(run.path.resolve(), 1, SubmitConfig(**options))
    sweep_scheduler = SweepScheduler("s", run, limits, trials, len(trials))
    with run.locked(), StopRequest() as stop:
        sweep_scheduler.run(stop)
    return sweep_scheduler


def sequential_executor(end):
    """Return an executor that runs one trial after the other; `end(trial)` returns the exit code."""

    def executor(take, limits, stop):
        while (task := take()) is not None:
            yield None
            yield TaskResult(task, end(task.trial), "the error")

    return executor


def finish(trial):
    (trial / "status.json").write_text('{"status": "done"}')
    return 0


@pytest.mark.parametrize("code", [1, 137, 143, -9, -11])
def test_errors_that_may_be_temporary_are_retried(sweep, monkeypatch, code):
    calls = []

    def end(trial):
        calls.append(trial.name[:3])
        return finish(trial) if calls.count(trial.name[:3]) == 3 or trial.name[:3] != "001" else code

    result = run_scheduler(sweep, sequential_executor(end), monkeypatch)
    assert not result.failed
    assert calls == ["000", "001", "002", "001", "001"]
    assert result.done == 3
    assert "001-lr: the error; try 3 of 3" in (sweep.path / "log.txt").read_text()


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6, 7, 8, 130])
def test_permanent_errors_are_not_retried(sweep, monkeypatch, code):
    calls = []
    result = run_scheduler(sweep, sequential_executor(lambda trial: calls.append(trial) or code), monkeypatch)
    assert len(calls) == 3
    assert result.failed["000-lr"] == (code, "the error")


def test_the_number_of_retries_is_limited(sweep, monkeypatch):
    calls = []
    result = run_scheduler(sweep, sequential_executor(lambda trial: calls.append(trial) or 137), monkeypatch, retries=1)
    assert len(calls) == 6
    assert len(result.failed) == 3


@contextlib.contextmanager
def hold_lock(trial):
    command = [sys.executable, "-c", HOLD, str(trial)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}) as run:
        try:
            run.stdout.readline()
            yield run
        finally:
            run.kill()


def test_a_trial_still_run_by_an_orphan_comes_last(sweep, monkeypatch):
    order = []
    with hold_lock(sweep.path / "trials" / "000-lr") as orphan:

        def end(trial):
            order.append(trial.name[:3])
            if len(order) == 2:
                orphan.kill()
                orphan.wait()
            return finish(trial)

        run_scheduler(sweep, sequential_executor(end), monkeypatch)
    assert order == ["001", "002", "000"]


@pytest.mark.parametrize("ends", [True, False])
def test_the_scheduler_waits_if_orphans_run_all_remaining_trials(sweep, monkeypatch, ends):
    started = []
    for name in ("001-lr", "002-lr"):
        finish(sweep.path / "trials" / name)
    with hold_lock(sweep.path / "trials" / "000-lr") as orphan:

        def sleep(seconds):
            if ends:
                finish(sweep.path / "trials" / "000-lr")
            orphan.kill()
            orphan.wait()

        monkeypatch.setattr(scheduler.time, "sleep", sleep)
        executor = sequential_executor(lambda trial: started.append(trial) or finish(trial))
        assert run_scheduler(sweep, executor, monkeypatch).done == 3
    assert len(started) == (0 if ends else 1)
    assert "waiting for 1 that are still running from an earlier start" in (sweep.path / "log.txt").read_text()


def test_the_last_error_of_a_trial(tmp_path):
    (tmp_path / executors.ERRORS).write_text("Traceback\nerror: no more\n")
    assert executors.read_last_error(tmp_path) == "no more"
    assert executors.read_last_error(tmp_path) == ""


def test_a_node_that_does_not_share_the_disk_gets_no_trial(sweep, monkeypatch):
    monkeypatch.setattr(node, "STORAGE_TIMEOUT_SECONDS", 0.0)
    task = Task(sweep.path / "trials" / "000-lr", "token")
    assert not node.shares_storage(task)
    (sweep.path / executors.TOKEN).write_text("token of a later scheduler")
    code, message = node.run(node.remote_task(task))
    assert code is None
    assert f"does not see the files of the sweep in {sweep.path}" in message
    (sweep.path / executors.TOKEN).write_text("token")
    assert node.shares_storage(task)

    def executor(take, limits, stop):
        yield node.task_result(take(), (None, message))

    with pytest.raises(RunDirError, match=r"does not see .* storage that all nodes share, with --runs-dir"):
        run_scheduler(sweep, executor, monkeypatch)


def test_the_environment_of_a_remote_task(monkeypatch, tmp_path):
    monkeypatch.setenv("CVLAB_DATA", "/data")
    remote_task = node.remote_task(Task(tmp_path, "token"))
    assert remote_task.environment["CVLAB_DATA"] == "/data"
    assert not set(remote_task.environment) & {"PATH", "HOME"}


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
def test_a_missing_extra_gives_a_one_line_error(cvlab, tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    space = "search: {algorithm: optuna, trials: 3, space: {reg: {low: 0.0, high: 1.0}}}\n"
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP.partition("grid")[0] + space)
    options = [] if extra == "optuna" else ["--on", extra, *(["--address", "local"] if extra == "slurm" else [])]
    code, _, err = cvlab("sweep", "s.yaml", *options)
    assert code == 2
    assert err.splitlines()[-1] == f"error: {package} is not installed; pip install -e '.[{extra}]'"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
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
def test_invalid_settings_are_rejected(tmp_path, overrides, message):
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    with pytest.raises(ConfigError) as error:
        loading.load("s.yaml", [f"{key}={value}" for key, value in overrides.items()])
    assert any(message in str(e) for e in (error.value, *error.value.further_errors)), error.value


def test_the_executor_is_not_part_of_the_sweep(cvlab, tmp_path):
    args = ("sweep", "s.yaml", "base.duration.steps=2", "base.data.num_train=100", "-q")
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    assert cvlab(*args)[0] == 0
    run = (tmp_path / "runs" / "latest").resolve()
    (run / "status.json").write_text('{"status": "interrupted", "experiment": "sweep"}')
    assert cvlab(*args, "--workers", 2, "submit.retries=0")[0] == 0
    assert len(list_runs(tmp_path / "runs")) == 1
    assert not (run / executors.TOKEN).exists()
    reloaded = loading.load(str(run)).config
    assert (reloaded.workers, reloaded.submit.retries) == (2, 0)


@pytest.mark.slow
def test_a_killed_scheduler_costs_less_than_half_a_sweep(started_sweep, tmp_path):
    args = ("base.duration.steps=2500", "seeds=[0,1]")
    start_time = time.monotonic()
    assert started_sweep(*args).wait() == 0
    undisturbed_seconds, expected = time.monotonic() - start_time, weights_of_trials(tmp_path)
    start_time = time.monotonic()
    process = started_sweep(*args, "--fresh")
    until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 7)
    process.kill()
    process.wait()
    assert started_sweep(*args).wait() == 0
    disturbed_seconds = time.monotonic() - start_time
    stderr = (tmp_path / "stderr.txt").read_text()
    assert weights_of_trials(tmp_path) == expected
    assert "already running" not in stderr
    assert "2 already done" in stderr
    assert disturbed_seconds <= 1.5 * undisturbed_seconds, (disturbed_seconds, undisturbed_seconds)
