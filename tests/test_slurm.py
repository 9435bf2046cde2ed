"""Sweeps as Slurm jobs, on this machine by submitit's local executor: the same weights, a preemption, refusals."""

import os
import signal
from pathlib import Path

import pytest

from cvlab import rundir
from cvlab.submit import Limits, Submit, slurm
from tests.conftest import SMALL_SWEEP, until, weights_of_arms

pytest.importorskip("submitit")
BEGUN = "runs/2*/arms/*/metrics.jsonl"
LOCAL = ("--on", "slurm", "--address", "local")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on(started_sweep, tmp_path):
    assert started_sweep().wait() == 0
    wanted = weights_of_arms(tmp_path)
    process = started_sweep("--fresh", *LOCAL, "--workers", "1")
    until(lambda: len(list(tmp_path.glob(BEGUN))) == 3)
    run = (tmp_path / "runs" / "latest").resolve()
    controller = next(int(path.name.partition("_")[0]) for path in run.glob("slurm/*_submitted.pkl"))
    for job in children(controller):
        os.kill(job, signal.SIGUSR2)  # what Slurm sends before it takes the node away
    assert process.wait() == 0, (tmp_path / "said.txt").read_text()
    assert weights_of_arms(tmp_path) == wanted
    first = min((run / "arms").iterdir())
    log = (first / "log.txt").read_text()
    assert "resumed step_" in log and "try 2 of" not in (run / "log.txt").read_text(), log


@pytest.mark.slow
def test_a_job_that_dies_is_tried_again_and_a_request_to_stop_lets_all_save(started_sweep, tmp_path):
    process = started_sweep(*LOCAL, "--workers", "1")
    until(lambda: len(list(tmp_path.glob(BEGUN))) == 1)
    run = (tmp_path / "runs" / "latest").resolve()
    controller = next(int(path.name.partition("_")[0]) for path in run.glob("slurm/*_submitted.pkl"))
    for pid in [controller, *children(controller)]:
        os.kill(pid, signal.SIGKILL)
    until(lambda: "ended without a result" in (run / "log.txt").read_text())
    until(lambda: "resumed step_" in (min((run / "arms").iterdir()) / "log.txt").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert not any(map(rundir.is_held, run.glob("arms/*"))) and not list(run.glob("arms/*/stderr.txt"))
    assert rundir.read_status(min((run / "arms").iterdir()))["status"] == "interrupted"


def test_no_slurm_is_one_line(cvlab, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    code, _, err = cvlab("sweep", "s.yaml", "--on", "slurm")
    assert code == 2 and "no sbatch; run it on a login node, or try --address local" in err
    assert not (tmp_path / "runs").exists()


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    submit = Submit(on="slurm", cpus=3, gpus=2, partition="short", minutes=30)
    executor = slurm._executor(Limits(tmp_path / "20261125-run", None, submit))
    text = executor._executor._make_submission_file_text("true", "uid")
    for wanted in (
        "cpus-per-task=3",
        "gpus-per-node=2",
        "partition=short",
        "time=30",
        "signal=USR2@90",
        "job-name=cvlab",
    ):
        assert wanted in text
