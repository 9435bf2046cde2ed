"""Run one configuration many times with some keys changed: a grid, tied values, seeds or a search.

References: Bergstra and Bengio, 2012, on grids and their limits.
Metrics: rules over the arms, as `spread(val_accuracy, model.batchnorm=true) < 0.1`.
Command: cvlab sweep configs/cifar_bn_lr_sweep.yaml --workers 2
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cvlab.config import loading, strict_yaml
from cvlab.config.expectations import GroupedResult
from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric
from cvlab.config.validation import Problems
from cvlab.data.resolve import DownloadPolicy
from cvlab.errors import CvlabError, RunDirError
from cvlab.experiments.base import Experiment
from cvlab.runs import user_code
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir
from cvlab.sweeps import adaptive, executors, results, trials
from cvlab.sweeps.config import SweepConfig, flatten_block
from cvlab.sweeps.executors import Limits
from cvlab.sweeps.scheduler import SweepScheduler, has_ended


def trial_dirs(config: SweepConfig, out: RunDir) -> list[Path]:
    """Return the run directories of the arms, in order; RunDirError where one is not there."""
    if not (out.path / "arms").is_dir():
        raise RunDirError(f"{out.path}: has no arms", "it stopped before it had begun; start it again")
    if config.search:
        return adaptive.trial_dirs(out.path)
    found = []
    for number, arm in enumerate(config.arms()):
        match = sorted((out.path / "arms").glob(f"{number:03d}-*"))
        if not match:
            raise RunDirError(f"{out.path}: the arm {arm.name} is gone", "start the sweep again with --fresh")
        found.append(match[0])
    return found


def trial_rows(config: SweepConfig, out: RunDir) -> list[dict[str, Any]]:
    """Return a row for each arm, its configuration as the sweep says it."""
    found = trial_dirs(config, out)
    raws = config.laid_over(map(adaptive.read_changes, found)) if config.search else config.arms()
    return [results.read_trial(folder, flatten_block(arm.raw)) for folder, arm in zip(found, raws, strict=True)]


def _search_metrics(found: adaptive.AdaptiveSearch, rows: list[dict[str, Any]], out: RunDir) -> dict[str, float]:
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


class SweepExperiment(Experiment[SweepConfig]):
    """Run one configuration many times with some keys changed: a grid, tied values, seeds or a search."""

    name = "sweep"
    Config = SweepConfig
    saves_checkpoints = False
    nested_configs = ("base",)
    dotted_blocks = (("grid",), ("zip",), ("search", "space"))
    metrics = (
        Metric("arms"),
        Metric("diverged", better="lower"),
        Metric("pruned", when=lambda config: config.search is not None),
        Metric("best", when=lambda config: config.search is not None),
    )

    def plan(self, config: SweepConfig, base: Path) -> dict[str, Any]:
        """Say what a sweep would do; ConfigError where what it needs is not installed."""
        executors.get_executor(config.submit)
        where = {"workers": config.workers or (1 if config.submit.on == "local" else None), "on": config.submit.on}
        if config.search is None:
            return {"arms": len(config.arms()), **where, "first arm": config.arms()[0].name}
        executors.require_package("optuna", "optuna")
        aim = f"{config.search.goal} {config.search.metric}"
        return {"trials": config.search.trials, "search": aim, "over": ", ".join(config.search.space), **where}

    def grouped_results(self, config: SweepConfig, out: RunDir) -> list[GroupedResult]:
        """Return the results of the arms that were not pruned, those that differ only in the seed averaged."""
        rows = [row for row in trial_rows(config, out) if row["status"] != results.PRUNED]
        return results.grouped_results(rows, config.varied(), config.diverged_counts_as)

    def prepare(self, loaded: Loaded, policy: DownloadPolicy) -> SweepConfig:
        """Return the sweep to run; every data set that it varies is there, and none of those has a fallback."""
        config = super().prepare(loaded, policy)
        strict_yaml.parse(config.to_yaml(), f"{loaded.source}, with all that is given,")  # or no resume could read it
        trials.resolve_datasets(config, loaded.base, policy)
        return config

    def write_inputs(self, config: SweepConfig, base: Path, run: RunDir) -> SweepConfig:
        """Write a run directory for every arm; return the configuration with paths relative to the sweep."""
        trials.create_trials(config, base, run)
        return user_code.rewrite_paths(config)

    def problems(self, config: SweepConfig, base: Path) -> Problems:
        """Return what is wrong with the arms and with the expectations over them."""
        return trials.sweep_problems(config, base)

    def run(self, config: SweepConfig, run: RunDir) -> dict[str, float]:
        """Run the arms that have not ended, tabulate and plot all of them; a failed arm fails the sweep at its end."""
        run_dirs = trial_dirs(config, run)
        limits = Limits(run.path.resolve(), config.workers, config.submit)
        if config.search is None:
            found, driver = None, SweepScheduler(config.name, run, limits, run_dirs, len(run_dirs))
        else:
            executors.require_package("optuna", "optuna")
            found = adaptive.AdaptiveSearch(
                run, config.search, config.diverged_counts_as, functools.partial(trials.add_trial, config, run)
            )
            driver = SweepScheduler(config.name, run, limits, run_dirs, config.search.trials, found.more, found.prune)
        at_a_time = config.workers or (1 if config.submit.on == "local" else "as many as there is room for")
        run.log(f"{driver.total} arms, {driver.done} of them ended before, {at_a_time} at a time on {config.submit.on}")
        with StopRequest() as stop:
            driver.run(stop)
            if stop.received is not None:
                raise stop.error(sum(map(has_ended, trial_dirs(config, run))), run.path.name, "arm")
        rows = trial_rows(config, run)
        results.write(run, rows, config.varied(), config.diverged_counts_as)
        if driver.failed:
            raise _failure(driver.failed, run)
        metrics = {"arms": len(run_dirs), "diverged": sum(row["diverged"] for row in rows)}
        return metrics if found is None else metrics | _search_metrics(found, rows, run)


def load_sweep(reference: str, overrides: Sequence[str] = ()) -> Loaded:
    """Load a sweep; any other configuration becomes the base of one, whose axes the overrides give.

    Raises:
        ConfigError: with all problems, each with its file and line.
    """
    source = loading.find(reference)
    value = strict_yaml.read(source).value
    if not isinstance(value, dict) or value.get("experiment") == SweepExperiment.name:
        return loading.load(reference, overrides)
    name = f"{loading.run_name(source, 50)}-sweep"
    text = {"experiment": SweepExperiment.name, "name": name, "base": {"from": str(source.resolve())}}
    return loading.load_document(strict_yaml.parse(yaml.safe_dump(text), str(source)), source, overrides)
