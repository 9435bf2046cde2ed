"""Executors: where the trials of a sweep run. On this machine, as Ray tasks, or as Slurm jobs.

An executor is a function `executor(next_task, limits, stop)`. Whenever it has room, it asks `next_task()` for a trial
(None: there is none at present), runs `cvlab resume TRIAL` somewhere, and yields a `TaskResult` for each trial that
ends. At least every POLL_SECONDS it yields, if only None, so that its caller can prune trials. It returns when nothing
runs and `next_task()` has none. Once `stop` has received a signal, no further trial starts and running ones are asked
to save and exit. Retrying failed trials is up to the caller.

A trial leaves all its results in its run directory, so any executor works that shares the storage.
"""

import importlib
import os
import re
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from annotated_types import Le
from pydantic import Field, model_validator

from cvlab import registry
from cvlab.config.schema import FrozenModel, NonNegativeInt, PositiveInt
from cvlab.errors import ConfigError, install_command
from cvlab.runs.interrupt import StopRequest
from cvlab.storage import regular_files

POLL_SECONDS = 0.2
EXIT_LOST = 137  # the exit code of a trial whose node or process was lost
ERRORS = "stderr.txt"  # the standard error of a trial, in its run directory until it ends
MAX_ERROR_BYTES = 2**16  # of its end
TOKEN = "driver.txt"  # a random token in the sweep's directory: a node that can read it shares the storage
EXECUTORS = {
    "local": "cvlab.sweeps.executors.local:run",
    "ray": "cvlab.sweeps.executors.ray_tasks:run",
    "slurm": "cvlab.sweeps.executors.slurm:run",
}
EXTRAS = {"ray": "ray", "slurm": "submitit"}  # the package that each executor needs


class SubmitConfig(FrozenModel):
    """Where trials run, and the resources of each."""

    on: Literal["local", "ray", "slurm"] = Field("local", description="this machine, a Ray cluster, or Slurm")
    address: str | None = Field(
        None,
        description="of a Ray cluster, host:port or auto; null: a cluster for the time of the sweep. "
        "For slurm: `local` runs the jobs on this machine, for testing",
    )
    cpus: Annotated[PositiveInt, Le(256)] = Field(1, description="CPU cores per trial, with ray and slurm")
    gpus: Annotated[NonNegativeInt, Le(64)] = Field(0, description="GPUs per trial, with ray and slurm")
    partition: str | None = Field(None, description="Slurm partition; null: the default")
    minutes: PositiveInt = Field(
        60, description="time limit of a Slurm job; a trial that takes longer is saved and resumed in the next job"
    )
    retries: Annotated[NonNegativeInt, Le(100)] = Field(
        2, description="how often a trial that was lost or killed is run again"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "SubmitConfig":
        if self.on == "local" and (self.address or self.gpus or self.partition):
            key = "address" if self.address else "gpus" if self.gpus else "partition"
            raise ValueError(f"{key} requires on: ray or slurm; on this machine trials share the resources")
        if self.on == "slurm" and self.address not in (None, "local"):
            raise ValueError(f"address: slurm has none but `local`, got {self.address!r}")
        if self.on == "ray" and not re.fullmatch(r"auto|[\w.-]+:\d{1,5}", self.address or "auto"):
            raise ValueError(f"address: expected host:port or auto, got {self.address!r}")
        return self


@dataclass(frozen=True)
class Limits:
    """What an executor may use: `workers` concurrent trials, None for as many as fit."""

    folder: Path
    workers: int | None
    submit: SubmitConfig


class Task(NamedTuple):
    """The absolute run directory of a trial, and the token that its node must find in the sweep's directory."""

    trial: Path
    token: str


class TaskResult(NamedTuple):
    """How the process of a trial ended: its exit code, negative for a signal, and its last error message."""

    task: Task
    code: int
    message: str


NextTask = Callable[[], Task | None]
Events = Generator[TaskResult | None, None, None]
Executor = Callable[[NextTask, Limits, StopRequest], Events]


def get_executor(submit: SubmitConfig) -> Executor:
    """Return the executor that a sweep is configured to use.

    Raises:
        ConfigError: if what it needs is not installed.
    """
    if submit.on in EXTRAS:
        require_package(EXTRAS[submit.on], submit.on)
    if submit.on == "slurm" and submit.address is None and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            "sbatch not found: no Slurm on this machine", "run it on a login node, or try --address local"
        )
    executor: Executor = registry.get("executor", submit.on, EXECUTORS)
    return executor


def require_package(package: str, extra: str) -> None:
    """Raise ConfigError with the command to install a package if it is missing."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{package} is not installed", install_command(extra)) from None


def open_errors(trial: Path) -> int:
    """Open the file for a trial's standard error, emptied; return its descriptor."""
    descriptor = regular_files.open_regular(trial / ERRORS, os.O_WRONLY | os.O_CREAT)
    os.ftruncate(descriptor, 0)
    return descriptor


def read_last_error(trial: Path) -> str:
    """Return the last line of a trial's standard error, and remove the file."""
    try:
        lines = regular_files.read_tail(trial / ERRORS, MAX_ERROR_BYTES).decode(errors="replace").splitlines()
        (trial / ERRORS).unlink()
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ") if lines else ""
