"""Sweeps as Slurm jobs, with submitit's local executor: the same weights, a preemption, errors."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from cvlab.runs.records import read_status
from cvlab.storage.lock import is_held
from cvlab.sweeps.executors import Limits, SubmitConfig, node, slurm
from tests.conftest import SMALL_SWEEP, until, weights_of_trials

pytest.importorskip("submitit")
METRICS_FILES = "runs/2*/trials/*/metrics.jsonl"
LOCAL = ("--on", "slurm", "--address", "local")


def controller_pid(run):
    """Return the process ID of the controller of a job, which is also the job's ID."""
    return next(int(path.name.partition("_")[0]) for path in run.glob("slurm/*_submitted.pkl"))


def child_pids(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_preempted_job_continues(started_sweep, undisturbed_weights, tmp_path):
    (tmp_path / "slow").touch()
    process = started_sweep(*LOCAL, "--workers", "1")
    until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 1)
    run = (tmp_path / "runs" / "latest").resolve()
    controller = controller_pid(run)
    for pid in child_pids(controller):
        os.kill(pid, signal.SIGUSR2)  # the signal that Slurm sends before a preemption
    (tmp_path / "slow").unlink()
    assert process.wait() == 0, (tmp_path / "stderr.txt").read_text()
    assert weights_of_trials(tmp_path) == undisturbed_weights
    first = min((run / "trials").iterdir())
    log = (first / "log.txt").read_text()
    assert "resumed step_" in log, log
    assert "try 2 of" not in (run / "log.txt").read_text(), log


@pytest.mark.slow
def test_a_killed_job_is_retried_and_a_request_to_stop_saves_all_trials(started_sweep, tmp_path):
    (tmp_path / "slow").touch()
    process = started_sweep(*LOCAL, "--workers", "1")
    until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 1)
    run = (tmp_path / "runs" / "latest").resolve()
    controller = controller_pid(run)
    for pid in [controller, *child_pids(controller)]:
        os.kill(pid, signal.SIGKILL)
    until(lambda: "ended without a result" in (run / "log.txt").read_text())
    until(lambda: "resumed step_" in (min((run / "trials").iterdir()) / "log.txt").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert not any(map(is_held, run.glob("trials/*")))
    assert not list(run.glob("trials/*/stderr.txt"))
    assert read_status(min((run / "trials").iterdir()))["status"] == "interrupted"


@pytest.mark.slow
def test_jobs_outlive_a_killed_scheduler_and_the_next_one_waits_for_them(started_sweep, undisturbed_weights, tmp_path):
    (tmp_path / "slow").touch()
    process = started_sweep(*LOCAL, "--workers", "2")
    until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 2)
    process.kill()
    process.wait()
    (tmp_path / "slow").unlink()
    assert started_sweep(*LOCAL, "--workers", "2").wait() == 0
    stderr = (tmp_path / "stderr.txt").read_text()
    assert weights_of_trials(tmp_path) == undisturbed_weights, stderr
    assert "still running from an earlier start of this sweep" in stderr, stderr
    logs = [path.read_text() for path in (tmp_path / "runs" / "latest").resolve().glob("trials/*/log.txt")]
    assert not any("resumed step_" in log for log in logs), "no other process has continued them"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves processes behind
def test_a_node_that_sees_another_disk_ends_the_sweep(cvlab, tmp_path, monkeypatch):
    remote_task = node.remote_task
    monkeypatch.setattr(node, "remote_task", lambda task: remote_task(task._replace(token="the token on another disk")))
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    code, _, err = cvlab("sweep", "s.yaml", *LOCAL)
    assert code == 5
    assert "does not see the files of the sweep" in err
    assert "--runs-dir" in err
    assert not list(tmp_path.glob(METRICS_FILES))


SLURM_COMMANDS = {  # the Slurm commands that submitit calls; jobs are process groups with scripts beside the commands
    "sbatch": """id=$$; cp "$1" $HERE/$id.sh; echo "Submitted batch job $id"; $HERE/start $id""",
    "start": """export SLURM_JOB_ID=$1 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
        setsid bash $HERE/$1.sh >$HERE/$1.log 2>&1 </dev/null & echo $! >$HERE/$1.pid""",
    "srun": """while [[ $1 != */python* ]]; do shift; done; "$@"; exit""",
    "scontrol": """echo "$@" >>$HERE/requeued; (sleep 1; $HERE/start $2) >/dev/null 2>&1 &""",
    "scancel": """kill -TERM -- -$(cat $HERE/$1.pid)""",
    "sacct": """echo "JobID|State|NodeList"; for job in $HERE/*.pid; do echo "$(basename $job .pid)|RUNNING|n"; done""",
}


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Return the folder of fake Slurm commands, which is first on the path."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in SLURM_COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\nHERE={folder}\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.mark.slow
def test_sweep_with_slurm_commands(started_sweep, undisturbed_weights, fake_slurm, tmp_path):
    (tmp_path / "slow").touch()
    process = started_sweep("--on", "slurm", "--workers", "1")
    until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 1)
    job = next(fake_slurm.glob("*.pid")).read_text().strip()
    # send the signal that Slurm sends before a preemption or the time limit
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"submitit.core._submit" in path.read_bytes() and os.getpgid(int(path.parent.name)) == int(job):
                os.kill(int(path.parent.name), signal.SIGUSR2)
    until((fake_slurm / "requeued").exists)
    (tmp_path / "slow").unlink()
    assert process.wait() == 0, (tmp_path / "stderr.txt").read_text()
    assert weights_of_trials(tmp_path) == undisturbed_weights
    run = (tmp_path / "runs" / "latest").resolve()
    assert "resumed step_" in (min((run / "trials").iterdir()) / "log.txt").read_text()
    process = started_sweep("--fresh", "--on", "slurm", "base.duration.steps=100000")
    until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    run = (tmp_path / "runs" / "latest").resolve()
    assert {read_status(trial)["status"] for trial in run.glob("trials/*")} == {"interrupted"}


def test_missing_slurm_gives_a_one_line_error(cvlab, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    code, _, err = cvlab("sweep", "s.yaml", "--on", "slurm")
    assert code == 2
    assert "no Slurm on this machine; run it on a login node, or try --address local" in err
    assert not (tmp_path / "runs").exists()


def test_a_job_rejected_by_slurm_gives_a_one_line_error(cvlab, tmp_path, fake_slurm):
    (fake_slurm / "sbatch").write_text("#!/bin/sh\necho 'error: invalid partition specified: no' >&2; exit 1\n")
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    code, _, err = cvlab("sweep", "s.yaml", "--on", "slurm", "submit.partition=no")
    assert code == 2
    assert "Slurm rejected the job: " in err
    assert "invalid partition specified: no; change submit" in err


def test_the_options_of_a_slurm_job(tmp_path, monkeypatch):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    submit = SubmitConfig(on="slurm", cpus=3, gpus=2, partition="short", minutes=30)
    executor = slurm._executor(Limits(tmp_path / "20261125-run", None, submit))
    text = executor._executor._make_submission_file_text("true", "uid")
    for option in (
        "cpus-per-task=3",
        "gpus-per-node=2",
        "partition=short",
        "time=30",
        "signal=USR2@90",
        "job-name=cvlab",
    ):
        assert option in text
