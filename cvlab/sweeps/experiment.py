"""Sweeps: run one configuration many times with some keys changed."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cvlab.config import loading, strict_yaml
from cvlab.config.expectations import GroupedResult
from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric
from cvlab.config.overrides import flatten
from cvlab.config.validation import Problems
from cvlab.data.resolve import DownloadPolicy
from cvlab.errors import CvlabError, RunDirError
from cvlab.experiments.base import Experiment
from cvlab.runs import user_code
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.records import require_folder
from cvlab.runs.run_dir import RunDir
from cvlab.sweeps import adaptive, executors, importance, results, trials
from cvlab.sweeps.config import SweepConfig
from cvlab.sweeps.executors import Limits
from cvlab.sweeps.scheduler import SweepScheduler, has_ended
from cvlab.sweeps.search import SearchConfig


def trial_dirs(config: SweepConfig, out: RunDir) -> list[Path]:
    """Return the run directories of the trials, in order.

    Raises:
        RunDirError: if one is missing.
    """
    if not (out.path / "trials").is_dir():
        raise RunDirError(f"{out.path}: has no trials", "it stopped before it started; start it again")
    if config.search:
        return adaptive.trial_dirs(out.path)
    dirs = []
    for number, trial in enumerate(config.trials()):
        match = sorted(require_folder(out.path / "trials").glob(f"{number:03d}-*"))
        if not match:
            raise RunDirError(f"{out.path}: the trial {trial.name} is missing", "start the sweep again with --fresh")
        dirs.append(require_folder(match[0]))
    return dirs


def trial_rows(config: SweepConfig, out: RunDir) -> list[dict[str, Any]]:
    """Return a row for each trial, with its configuration as the sweep has it."""
    dirs = trial_dirs(config, out)
    all_trials = config.apply_changes(map(adaptive.read_changes, dirs)) if config.search else config.trials()
    return [results.read_trial(path, flatten(trial.raw)) for path, trial in zip(dirs, all_trials, strict=True)]


def _require_packages(search: SearchConfig) -> None:
    """Raise ConfigError if the package of a search is not installed."""
    if search.algorithm == "optuna":
        executors.require_package("optuna", "optuna")


def _stops_trials(config: SweepConfig) -> bool:
    return config.search is not None and config.search.stops_trials


def _search_metrics(search: adaptive.AdaptiveSearch, rows: list[dict[str, Any]], out: RunDir) -> dict[str, float]:
    """Record the best trial; return the metrics that a search adds."""
    metrics = {"trials": len(rows), "pruned": sum(row["status"] == results.PRUNED for row in rows)}
    if search.config.stops_trials:
        steps, full = results.count_steps(adaptive.trial_dirs(out.path))
        saved = 1 - steps / full if full else 0.0
        metrics |= {"steps": steps, "full_steps": full, "steps_saved": saved}
        out.log(f"{steps:,} steps in place of {full:,}, {saved:.0%} saved by stopping trials early")
    best = search.best()
    if best is None:
        return metrics
    out.extra_summary["best"] = best
    value = best[search.config.metric]
    out.log(f"best: {best['trial']}, {search.config.metric} {value:.4g}")
    return metrics | {"best": value}


def _write_settings(config: SweepConfig, out: RunDir, rows: list[dict[str, Any]]) -> None:
    """Add to summary.json what varies in each trial with the metric that it is judged by, and which keys matter."""
    dirs = trial_dirs(config, out)
    changes = [adaptive.read_changes(path) for path in dirs] if config.search else config.changes()
    settings = [config.settings_of(change) for change in changes]
    metric = config.search.metric if config.search else results.main_metric(rows)
    if metric is None or not any(settings):
        return
    measured = [results.last_value(row, path, metric) for row, path in zip(rows, dirs, strict=True)]
    for trial, keys, value in zip(out.extra_summary["trials"], settings, measured, strict=True):
        trial |= {"keys": keys, "value": value}
    rungs = adaptive.rungs_of(config)
    compared = [results.trial_metrics(row, config.diverged_values).get(metric) for row in rows]
    if rungs is not None:  # at the first rung all trials can be compared
        compared = [rungs.first_value(path) for path in dirs]
    pairs = [(k, v) for k, v in zip(settings, compared, strict=True) if v is not None and results.is_finite(v)]
    judged = {"metric": metric, "goal": config.search.goal if config.search else results.goal_of(rows, metric)}
    if rungs is not None:
        judged["after"] = f"{rungs.config.unit} {rungs.limits[0]}"
    measures = importance.importance([keys for keys, _ in pairs], [value for _, value in pairs], config.log_keys())
    out.extra_summary["importance"] = {**judged, "log_keys": config.log_keys(), **measures}


def _failure(failed: Mapping[str, tuple[int, str]], out: RunDir) -> CvlabError:
    """Return the error of a sweep with failed trials, with the exit code of the first."""
    name, (code, message) = next(iter(failed.items()))
    error = CvlabError(
        f"{len(failed)} trials failed, the first is {name}: {message}",
        f"`cvlab resume {out.path.name}` runs them again",
    )
    error.code = code if code > 0 else 1
    return error


class SweepExperiment(Experiment[SweepConfig]):
    """Run one configuration many times with some keys changed: a grid, tied values, seeds or a search.

    References:
        Bergstra and Bengio, 2012, on grids, their limits, and random search.

    Metrics:
        Functions over the trials, such as `spread(val_accuracy, model.batchnorm=true) < 0.1`.

    Command:
        cvlab sweep configs/cifar_bn_lr_sweep.yaml --workers 2
    """

    name = "sweep"
    Config = SweepConfig
    saves_checkpoints = False
    nested_configs = ("base",)
    dotted_blocks = (("grid",), ("zip",), ("search", "space"))
    metrics = (
        Metric("trials"),
        Metric("diverged", better="lower"),
        Metric("pruned", when=lambda config: config.search is not None),
        Metric("best", when=lambda config: config.search is not None),
        Metric("steps", better="lower", when=_stops_trials),
        Metric("full_steps", when=_stops_trials),
        Metric("steps_saved", "fraction", "higher", _stops_trials),
    )

    def plan(self, config: SweepConfig, base: Path) -> dict[str, Any]:
        """Return what a sweep would do.

        Raises:
            ConfigError: if a package that it needs is not installed.
        """
        executors.get_executor(config.submit)
        placement = {"workers": config.workers or (1 if config.submit.on == "local" else None), "on": config.submit.on}
        if config.search is None:
            return {"trials": len(config.trials()), **placement, "first_trial": config.trials()[0].name}
        _require_packages(config.search)
        objective = f"{config.search.goal} {config.search.metric}"
        return {
            "trials": config.search.trials,
            "search": objective,
            "search_space": ", ".join(config.search.space),
            **placement,
        }

    def grouped_results(self, config: SweepConfig, out: RunDir) -> list[GroupedResult]:
        """Return the results of the trials that were not pruned, those that differ only in the seed averaged."""
        rows = [row for row in trial_rows(config, out) if row["status"] != results.PRUNED]
        return results.grouped_results(rows, config.varied_keys(), config.diverged_values)

    def prepare(self, loaded: Loaded, policy: DownloadPolicy) -> SweepConfig:
        """Return the sweep to run; all data sets that it varies are available, without fallbacks."""
        config = super().prepare(loaded, policy)
        strict_yaml.parse(config.to_yaml(), f"{loaded.source}, with all overrides,")  # or no resume could read it
        trials.resolve_datasets(config, loaded.base, policy)
        return config

    def write_inputs(self, config: SweepConfig, base: Path, run: RunDir) -> SweepConfig:
        """Write a run directory for every trial; return the configuration with paths relative to the sweep."""
        trials.create_trials(config, base, run)
        return user_code.rewrite_paths(config)

    def problems(self, config: SweepConfig, base: Path) -> Problems:
        """Return what is wrong with the trials and with the expectations over them."""
        return trials.sweep_problems(config, base)

    def run(self, config: SweepConfig, run: RunDir) -> dict[str, float]:
        """Run the trials that have not ended, tabulate and plot all; a failed trial fails the sweep at its end."""
        run_dirs = trial_dirs(config, run)
        limits = Limits(run.path.resolve(), config.workers, config.submit)
        if config.search is None:
            search, scheduler = None, SweepScheduler(config.name, run, limits, run_dirs, len(run_dirs))
        else:
            _require_packages(config.search)
            search = adaptive.AdaptiveSearch(
                run,
                config.search,
                config.diverged_values,
                functools.partial(trials.add_trial, config, run),
                adaptive.rungs_of(config),
            )
            total = config.search.trials
            scheduler = SweepScheduler(config.name, run, limits, run_dirs, total, search.next_trial, search.prune)
        workers = config.workers or (1 if config.submit.on == "local" else "as many as fit")
        run.log(f"{scheduler.total} trials, {scheduler.done} already done, {workers} at a time on {config.submit.on}")
        with StopRequest() as stop:
            scheduler.run(stop)
            if stop.received is not None:
                raise stop.error(sum(map(has_ended, trial_dirs(config, run))), run.path.name, "trial")
        rows = trial_rows(config, run)
        results.write(run, rows, config.varied_keys(), config.diverged_values)
        _write_settings(config, run, rows)
        if scheduler.failed:
            raise _failure(scheduler.failed, run)
        metrics = {"trials": len(run_dirs), "diverged": sum(row["diverged"] for row in rows)}
        return metrics if search is None else metrics | _search_metrics(search, rows, run)


def load_sweep(reference: str, overrides: Sequence[str] = ()) -> Loaded:
    """Load a sweep; any other configuration becomes the base of one, whose axes the overrides give.

    Raises:
        ConfigError: with all problems, each with its file and line.
    """
    source = loading.find(reference)
    document = strict_yaml.read(source)
    is_block = isinstance(document.value, dict)
    if not is_block or loading.resolve_base(document, source).value.get("experiment") == SweepExperiment.name:
        return loading.load(reference, overrides)
    name = f"{loading.run_name(source, 50)}-sweep"
    text = {"experiment": SweepExperiment.name, "name": name, "base": {"from": str(source.resolve())}}
    return loading.load_document(strict_yaml.parse(yaml.safe_dump(text), str(source)), source, overrides)
