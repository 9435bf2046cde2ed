"""Engines: where the arms of a sweep run. On this machine, as Ray tasks, as Slurm jobs.

An engine is a function `engine(take, limits, stop)`. It asks `take()` for the next arm whenever it has room for one
(None: there is none at present), runs `cvlab resume ARM` somewhere, and yields an `Ended` for each arm as it ends; at
least every POLL_SECONDS it yields, if only None, so that its caller can look around. It ends when nothing runs and
`take()` has none. When `stop` has received a signal no further arm starts, and those that run are asked to save and
end. Whether an arm that has failed is tried again is not its business.

What an arm does it leaves in its run directory, so that any engine fits that shares the disk.
"""

import importlib
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
from cvlab.errors import ConfigError
from cvlab.runs.interrupt import StopRequest

POLL_SECONDS = 0.2
EXIT_LOST = 137  # the exit code of an arm whose node or process was lost without a word
ERRORS = "stderr.txt"  # what an arm says on standard error, in its run directory until it has ended
TOKEN = "driver.txt"  # a random word in the sweep's directory: who reads it there shares the disk with the driver
EXECUTORS = {
    "local": "cvlab.sweeps.executors.local:run",
    "ray": "cvlab.sweeps.executors.ray_tasks:run",
    "slurm": "cvlab.sweeps.executors.slurm:run",
}
EXTRAS = {"ray": "ray", "slurm": "submitit"}  # the package that each of them needs


class SubmitConfig(FrozenModel):
    """Where arms run, and what each of them gets there."""

    on: Literal["local", "ray", "slurm"] = Field("local", description="this machine, a Ray cluster, or Slurm")
    address: str | None = Field(
        None,
        description="of a Ray cluster, host:port or auto; null: one that lives as long as the sweep. "
        "For slurm: local runs its jobs on this machine, to try it",
    )
    cpus: Annotated[PositiveInt, Le(256)] = Field(1, description="CPU cores of an arm, with ray and slurm")
    gpus: Annotated[NonNegativeInt, Le(64)] = Field(0, description="GPUs of an arm, with ray and slurm")
    partition: str | None = Field(None, description="of Slurm; null: its default")
    minutes: PositiveInt = Field(
        60, description="of a Slurm job; an arm that takes longer is saved and goes on in the next"
    )
    retries: Annotated[NonNegativeInt, Le(100)] = Field(
        2, description="how often an arm is tried again that was lost or killed"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "SubmitConfig":
        if self.on == "local" and (self.address or self.gpus or self.partition):
            key = "address" if self.address else "gpus" if self.gpus else "partition"
            raise ValueError(f"{key} goes with on: ray or slurm; on this machine arms share what is there")
        if self.on == "slurm" and self.address not in (None, "local"):
            raise ValueError(f"address: slurm has none but `local`, got {self.address!r}")
        if self.on == "ray" and not re.fullmatch(r"auto|[\w.-]+:\d{1,5}", self.address or "auto"):
            raise ValueError(f"address: expected host:port or auto, got {self.address!r}")
        return self


@dataclass(frozen=True)
class Limits:
    """What an engine may use: `workers` arms at a time, null for as many as there is room for."""

    folder: Path
    workers: int | None
    submit: SubmitConfig


class Task(NamedTuple):
    """An arm's run directory, absolute, and the word that its node must find in the sweep's directory."""

    arm: Path
    token: str


class TaskResult(NamedTuple):
    """How the process of an arm has ended: its exit code, negative for a signal, and its last words."""

    task: Task
    code: int
    said: str


Take = Callable[[], Task | None]
Events = Generator[TaskResult | None, None, None]
Executor = Callable[[Take, Limits, StopRequest], Events]


def get_executor(submit: SubmitConfig) -> Executor:
    """Return the engine that is to be used; ConfigError where what it needs is not there."""
    if submit.on in EXTRAS:
        require_package(EXTRAS[submit.on], submit.on)
    if submit.on == "slurm" and submit.address is None and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError("no Slurm on this machine: no sbatch", "run it on a login node, or try --address local")
    found: Executor = registry.get("submitter", submit.on, EXECUTORS)
    return found


def require_package(package: str, extra: str) -> None:
    """Raise ConfigError with what to install where a package is not there."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{package} is not installed", f"pip install 'cvlab[{extra}]'") from None


def read_last_error(arm: Path) -> str:
    """Return the last line that an arm said on standard error, and remove the file."""
    try:
        lines = (arm / ERRORS).read_text(errors="replace").splitlines()
        (arm / ERRORS).unlink()
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ") if lines else ""
