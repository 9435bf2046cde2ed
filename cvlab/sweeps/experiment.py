"""Run one configuration many times with some keys changed: a grid, tied values, seeds, a search; each arm a run.

Paper: Bergstra and Bengio, 2012, on grids and their limits.
Expect: rules over the arms, as `spread(val_accuracy, model.batchnorm=true) < 0.1`.
Command: cvlab sweep configs/cifar_bn_lr_sweep.yaml --workers 2
"""

import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from cvlab.config.expectations import GroupedResult
from cvlab.config.schema import DataConfig, ExperimentConfig, FrozenModel, NonNegativeInt
from cvlab.config.validation import Problems
from cvlab.errors import CvlabError, RunDirError
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir
from cvlab.sweeps import arms, executors, results, trials
from cvlab.sweeps import grid as sweeps_grid
from cvlab.sweeps.executors import Limits, Submit
from cvlab.sweeps.scheduler import SweepScheduler, has_ended
from cvlab.sweeps.search import Search

MAX_ARMS = 1000
Values = dict[str, tuple[Any, ...]]


class Condition(FrozenModel):
    """Keys that are tied to others: where all of `when` hold, `set` is laid over the arm."""

    when: dict[str, Any] = Field(description="dotted keys and the values they must have")
    set: dict[str, Any] = Field(description="dotted keys and the values they get")


class Config(ExperimentConfig):
    """A base configuration and what varies."""

    base: dict[str, Any] = Field(description="an ordinary configuration; `from:` names one to start from")
    grid: Values = Field({}, description="dotted keys with lists of values: every combination is an arm")
    zip: Values = Field({}, description="dotted keys with lists of one length, walked together as one axis")
    conditions: tuple[Condition, ...] = Field((), description="keys tied to others")
    seeds: tuple[NonNegativeInt, ...] = Field((), description="every arm once with each; empty: the base's own seed")
    search: Search | None = Field(None, description="in place of an axis: arms proposed one by one, each from the last")
    workers: Annotated[int, Ge(1), Le(64)] | None = Field(
        None, description="arms at a time; null: one on this machine, elsewhere as many as there is room for"
    )
    submit: Submit = Field(Submit(), description="where arms run")
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
        return self

    @model_validator(mode="after")
    def _each_key_once(self) -> "Config":
        axis = "grid" if self.grid else "zip" if self.zip else "seeds"
        if self.search and getattr(self, axis):
            raise ValueError(f"{axis} and search: a search proposes all its arms; give one of the two")
        space = self.search.space if self.search else {}
        changed = [*self.grid, *self.zip, *space, *(["seed"] if self.seeds else [])]
        for key in changed:
            above = [other for other in changed if key.startswith(f"{other}.")]
            if above or changed.count(key) > 1:
                raise ValueError(f"{key} is varied twice" + (f", also by {above[0]}" if above else ""))
        return self

    @property
    def data(self) -> DataConfig | None:
        """The base's data, as far as every experiment has it."""
        block = self.base.get("data")
        if not isinstance(block, Mapping):
            return None
        return DataConfig(**{key: block[key] for key in DataConfig.model_fields if key in block})

    def with_data(self, data: DataConfig) -> "Config":
        """Return the sweep over other data."""
        return self.model_copy(update={"base": {**self.base, "data": {**self.base["data"], **data.model_dump()}}})

    def arms(self) -> list[sweeps_grid.Arm]:
        """Return the arms, not validated; of a search those with every end and every choice."""
        return self.laid_over(
            self.search.corners() if self.search else sweeps_grid.combinations(self.grid, self.zip, self.seeds)
        )

    def laid_over(self, changes: Iterable[Mapping[str, Any]], first: int = 0) -> list[sweeps_grid.Arm]:
        """Return arms that change the base as told, numbered from `first`."""
        conditions = [(condition.when, condition.set) for condition in self.conditions]
        return sweeps_grid.expand(self.base, map(dict, changes), conditions, first)

    def varied(self) -> list[str]:
        """Return the dotted keys in which the arms differ, the seed left out; those of whole blocks one by one."""
        changed = [*self.grid.items(), *self.zip.items(), *(self.search.values().items() if self.search else ())]
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
    return {"arms", "diverged"} | ({"pruned", "best"} if config.search else set())


def plan(config: Config, base: Path) -> dict[str, Any]:
    """Say what a sweep would do; ConfigError where what it needs is not installed."""
    executors.find(config.submit)
    where = {"workers": config.workers or (1 if config.submit.on == "local" else None), "on": config.submit.on}
    if config.search is None:
        return {"arms": len(config.arms()), **where, "first arm": config.arms()[0].name}
    executors.require("optuna", "optuna")
    aim = f"{config.search.goal} {config.search.metric}"
    return {"trials": config.search.trials, "search": aim, "over": ", ".join(config.search.space), **where}


def folders(config: Config, out: RunDir) -> list[Path]:
    """Return the run directories of the arms, in order; RunDirError where one is not there."""
    if not (out.path / "arms").is_dir():
        raise RunDirError(f"{out.path}: has no arms", "it stopped before it had begun; start it again")
    if config.search:
        return trials.folders(out.path)
    found = []
    for number, arm in enumerate(config.arms()):
        match = sorted((out.path / "arms").glob(f"{number:03d}-*"))
        if not match:
            raise RunDirError(f"{out.path}: the arm {arm.name} is gone", "start the sweep again with --fresh")
        found.append(match[0])
    return found


def rows_of(config: Config, out: RunDir) -> list[dict[str, Any]]:
    """Return a row for each arm, its configuration as the sweep says it."""
    found = folders(config, out)
    raws = config.laid_over(map(trials.changes_of, found)) if config.search else config.arms()
    return [results.read_arm(folder, _dotted(arm.raw)) for folder, arm in zip(found, raws, strict=True)]


def settings(config: Config, out: RunDir) -> list[GroupedResult]:
    """Return what expectations judge: the arms, those that differ in the seed only taken together; no pruned ones."""
    rows = [row for row in rows_of(config, out) if row["status"] != results.PRUNED]
    return results.settings(rows, config.varied(), config.diverged_counts_as)


def problems(config: Config, base: Path) -> Problems:
    """Return what is wrong with the arms and with the expectations over them."""
    return arms.problems(config, base)


def run(config: Config, out: RunDir) -> dict[str, float]:
    """Run the arms that have not ended, tabulate and plot all of them; a failed arm fails the sweep at its end."""
    run_dirs = folders(config, out)
    limits = Limits(out.path.resolve(), config.workers, config.submit)
    if config.search is None:
        found, driver = None, SweepScheduler(config.name, out, limits, run_dirs, len(run_dirs))
    else:
        executors.require("optuna", "optuna")
        found = trials.Trials(out, config.search, config.diverged_counts_as, functools.partial(arms.add, config, out))
        driver = SweepScheduler(config.name, out, limits, run_dirs, config.search.trials, found.more, found.prune)
    at_a_time = config.workers or (1 if config.submit.on == "local" else "as many as there is room for")
    out.log(f"{driver.total} arms, {driver.done} of them ended before, {at_a_time} at a time on {config.submit.on}")
    with StopRequest() as stop:
        driver.run(stop)
        if stop.received is not None:
            raise stop.error(sum(map(has_ended, folders(config, out))), out.path.name, "arm")
    rows = rows_of(config, out)
    results.write(out, rows, config.varied(), config.diverged_counts_as)
    if driver.failed:
        raise _failure(driver.failed, out)
    metrics = {"arms": len(run_dirs), "diverged": sum(row["diverged"] for row in rows)}
    return metrics if found is None else metrics | _searched(found, rows, out)


def _searched(found: trials.Trials, rows: list[dict[str, Any]], out: RunDir) -> dict[str, float]:
    """Say which trial was the best; return what a search measures besides."""
    metrics = {"arms": len(rows), "pruned": sum(row["status"] == results.PRUNED for row in rows)}
    best = found.best()
    if best is None:
        return metrics
    out.extra_summary["best"] = best
    value = best[found.wanted.metric]
    out.log(f"the best: {best['arm']}, {found.wanted.metric} {value:.4g}")
    return metrics | {"best": value}


def _failure(failed: Mapping[str, tuple[int, str]], out: RunDir) -> CvlabError:
    """Build the error that ends a sweep some of whose arms have failed, with the exit code of the first."""
    name, (code, said) = next(iter(failed.items()))
    error = CvlabError(
        f"{len(failed)} arms failed, the first is {name}: {said}", f"`cvlab resume {out.path.name}` tries them again"
    )
    error.code = code if code > 0 else 1
    return error
