"""Run one configuration many times with some keys changed: a grid, tied values, seeds; each arm a run of its own.

Paper: Bergstra and Bengio, 2012, on grids and their limits.
Expect: rules over the arms, as `spread(val_accuracy, model.batchnorm=true) < 0.1`.
Command: cvlab sweep configs/bn_lr_sweep.yaml --workers 2
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from cvlab import axes, rundir, submit
from cvlab.console import Progress
from cvlab.errors import CvlabError, DivergedError, RunDirError
from cvlab.expect import Setting
from cvlab.report import sweeps
from cvlab.rundir import RunDir
from cvlab.schema import AnyConfig, DataBlock, Frozen, Index
from cvlab.signals import StopRequest
from cvlab.submit import Task

MAX_ARMS = 1000
ENDED = ("done", "unmet")
Values = dict[str, tuple[Any, ...]]


class Condition(Frozen):
    """Keys that are tied to others: where all of `when` hold, `set` is laid over the arm."""

    when: dict[str, Any] = Field(description="dotted keys and the values they must have")
    set: dict[str, Any] = Field(description="dotted keys and the values they get")


class Config(AnyConfig):
    """A base configuration and what varies."""

    base: dict[str, Any] = Field(description="an ordinary configuration; `from:` names one to start from")
    grid: Values = Field({}, description="dotted keys with lists of values: every combination is an arm")
    zip: Values = Field({}, description="dotted keys with lists of one length, walked together as one axis")
    conditions: tuple[Condition, ...] = Field((), description="keys tied to others")
    seeds: tuple[Index, ...] = Field((), description="every arm once with each; empty: the base's own seed")
    workers: Annotated[int, Ge(1), Le(64)] = Field(1, description="arms at a time")
    diverged_counts_as: dict[str, float] = Field(
        {}, description="what expectations and plots take for an arm that diverged; by default it has no metrics"
    )

    @model_validator(mode="after")
    def _sizes(self) -> "Config":
        for key, values in {**self.grid, **self.zip}.items():
            if not values:
                raise ValueError(f"{key}: the list of values is empty")
        if len({len(values) for values in self.zip.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(values)}" for key, values in self.zip.items())
            raise ValueError(f"zip: the lists must be of one length: {lengths}")
        if self.grid.keys() & self.zip.keys():
            raise ValueError(f"{min(self.grid.keys() & self.zip.keys())} is in grid and in zip")
        sizes = [len(values) for values in self.grid.values()] + [len(v) for v in list(self.zip.values())[:1]]
        if (count := math.prod(sizes) * max(1, len(self.seeds))) > MAX_ARMS:
            raise ValueError(f"{count} arms; at most {MAX_ARMS}")
        for key, values in {**self.grid, "seeds": self.seeds}.items():
            if len({repr(value) for value in values}) < len(values):
                raise ValueError(f"{key}: a value is there twice")
        changed = [*self.grid, *self.zip, *(["seed"] if self.seeds else [])]
        for key in changed:
            above = [other for other in changed if key.startswith(f"{other}.")]
            if above or changed.count(key) > 1:
                raise ValueError(f"{key} is varied twice" + (f", also by {above[0]}" if above else ""))
        return self

    @property
    def data(self) -> DataBlock | None:
        """The base's data, as far as every experiment has it."""
        block = self.base.get("data")
        if not isinstance(block, Mapping):
            return None
        return DataBlock(**{key: block[key] for key in DataBlock.model_fields if key in block})

    def with_data(self, data: DataBlock) -> "Config":
        """Return the sweep over other data."""
        return self.model_copy(update={"base": {**self.base, "data": {**self.base["data"], **data.model_dump()}}})

    def arms(self) -> list[axes.Arm]:
        """Return the arms, not validated."""
        conditions = [(condition.when, condition.set) for condition in self.conditions]
        return axes.expand(self.base, axes.combinations(self.grid, self.zip, self.seeds), conditions)

    def varied(self) -> list[str]:
        """Return the dotted keys in which the arms differ, the seed left out; those of whole blocks one by one."""
        changed = [*self.grid.items(), *self.zip.items()]
        changed += [(key, (value,)) for condition in self.conditions for key, value in condition.set.items()]
        found: dict[str, None] = {}
        for key, values in changed:
            blocks = [_dotted(value, f"{key}.") for value in values if isinstance(value, Mapping)]
            found |= {inner: None for block in blocks for inner in block} if blocks else {key: None}
        return [key for key in found if key != "seed"]


def _dotted(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in block.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def metric_names(config: Config) -> set[str]:
    """Return the names that an expectation can speak of, besides functions of the arms."""
    return {"arms", "diverged"}


def plan(config: Config, base: Path) -> dict[str, Any]:
    """Say what a sweep would do."""
    return {"arms": len(config.arms()), "workers": config.workers, "first arm": config.arms()[0].name}


def folders(config: Config, out: RunDir) -> list[Path]:
    """Return the run directories of the arms, in order; RunDirError where one is not there."""
    if not (out.path / "arms").is_dir():
        raise RunDirError(f"{out.path}: has no arms", "it stopped before it had begun; start it again")
    found = []
    for number, arm in enumerate(config.arms()):
        match = sorted((out.path / "arms").glob(f"{number:03d}-*"))
        if not match:
            raise RunDirError(f"{out.path}: the arm {arm.name} is gone", "start the sweep again with --fresh")
        found.append(match[0])
    return found


def rows_of(config: Config, out: RunDir) -> list[dict[str, Any]]:
    """Return a row for each arm, its configuration as the sweep says it."""
    arms = zip(folders(config, out), config.arms(), strict=True)
    return [sweeps.read_arm(folder, _dotted(arm.raw)) for folder, arm in arms]


def has_ended(arm: Path) -> bool:
    """Whether an arm need not be run again: it has its result, or it diverged and would do so again."""
    try:
        status = rundir.read_status(arm)
    except CvlabError:
        return False
    return status.get("status") in ENDED or status.get("code") == DivergedError.code


def settings(config: Config, out: RunDir) -> list[Setting]:
    """Return what expectations judge: the arms, those that differ in the seed only taken together."""
    return sweeps.settings(rows_of(config, out), config.varied(), config.diverged_counts_as)


def run(config: Config, out: RunDir) -> dict[str, float]:
    """Run the arms that have not ended, tabulate and plot all of them; a failed arm fails the sweep at its end."""
    arms = folders(config, out)
    waiting = [arm for arm in arms if not has_ended(arm)]
    out.log(f"{len(arms)} arms, {len(arms) - len(waiting)} of them ended before, {config.workers} at a time")
    failed: dict[str, tuple[int, str]] = {}
    tasks = [Task(("resume", str(arm.resolve()), "-q"), arm / "stderr.txt") for arm in waiting]
    with StopRequest() as stop, Progress(config.name, len(arms), len(arms) - len(waiting)) as progress:
        for done, (index, code) in enumerate(submit.local(tasks, config.workers, stop), 1):
            arm, said = waiting[index], submit.errors_of(tasks[index])
            if not has_ended(arm) and stop.received is None:
                failed[arm.name] = (code, said or f"it ended with exit code {code}")
            out.log(f"{arm.name}: {sweeps.outcome(arm)}")
            out.set_status("running", step=len(arms) - len(waiting) + done, total_steps=len(arms))
            progress.update(len(arms) - len(waiting) + done, "")
        if stop.received is not None:
            raise stop.error(sum(map(has_ended, arms)), out.path.name, "arm")
    rows = rows_of(config, out)
    sweeps.write(out, rows, config.varied(), config.diverged_counts_as)
    if failed:
        raise _failure(failed, out)
    return {"arms": len(arms), "diverged": sum(row["diverged"] for row in rows)}


def _failure(failed: Mapping[str, tuple[int, str]], out: RunDir) -> CvlabError:
    """Build the error that ends a sweep some of whose arms have failed, with the exit code of the first."""
    name, (code, said) = next(iter(failed.items()))
    error = CvlabError(
        f"{len(failed)} arms failed, the first is {name}: {said}", f"`cvlab resume {out.path.name}` tries them again"
    )
    error.code = code if code > 0 else 1
    return error
