"""The trials of a sweep: validated together with it, and written as run directories before the first one runs."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvlab import portability, registry
from cvlab.config import expectations, overrides, validation
from cvlab.config.overrides import flatten
from cvlab.config.schema import DataConfig, Duration, ExperimentConfig, RunConfig
from cvlab.config.strict_yaml import KeyPath
from cvlab.config.validation import Problems, is_known, unknown_metric
from cvlab.data.resolve import DownloadPolicy, resolve_dataset
from cvlab.distributed import process_group
from cvlab.errors import ConfigError
from cvlab.runs import rung, user_code
from cvlab.runs.run_dir import RunDir
from cvlab.storage import atomic
from cvlab.sweeps import adaptive, asha, grid
from cvlab.sweeps.config import SweepConfig


def trial_configs(sweep: SweepConfig, base: Path) -> list[tuple[str, RunConfig]]:
    """Return the name and the configuration of every trial.

    Raises:
        ConfigError: if one is not valid.
    """
    named_configs = []
    for trial in sweep.trials():
        config, problems = validation.check(trial.raw, base)
        if config is None:
            raise ConfigError(f"{trial.name}: {problems[0][1]}")
        assert isinstance(config, RunConfig)
        named_configs.append((trial.name, config))
    return named_configs


def sweep_problems(sweep: SweepConfig, base: Path) -> Problems:
    """Return what is wrong with the trials and with the expectations over them, each with its path in the sweep."""
    misplaced = [key for key in overrides.NOT_INHERITED if key in sweep.base]
    if misplaced:
        return [(("base", misplaced[0]), f"base.{misplaced[0]}: a trial has none; put it beside `base`")]
    if sweep.base.get("profiles"):
        return [
            (("base", "profiles"), "base.profiles: a trial has one profile; name it with base.profile beside base.from")
        ]
    if sweep.base.get("experiment") == sweep.experiment:
        return [(("base", "experiment"), "sweeps cannot be nested")]
    invalid: dict[tuple[KeyPath, str], None] = {}
    valid = []
    for trial in sweep.trials():
        config, problems = validation.check(trial.raw, base)
        invalid |= {_locate_problem(sweep, path, message): None for path, message in problems}
        if config is not None:
            valid.append(config)
    return (
        list(invalid)
        or _rung_problems(sweep, valid)
        or _time_budget_problems(sweep, valid)
        or _name_problems(sweep, valid)
        or _expectation_problems(sweep, valid)
    )


def _rung_problems(sweep: SweepConfig, valid: list[ExperimentConfig]) -> Problems:
    if sweep.search is None or sweep.search.asha is None:
        return []
    duration = getattr(valid[0], "duration", None)
    block = duration.model_dump() if isinstance(duration, Duration) else {}
    message = asha.problem(sweep.search.asha, sweep.search.trials, block, sweep.varied_keys())
    return [(("search", "asha"), f"search.asha: {message}")] if message else []


def _time_budget_problems(sweep: SweepConfig, valid: list[ExperimentConfig]) -> Problems:
    """Reject a budget of seconds for trials that would compete for the machine."""
    are_concurrent = sweep.workers > 1 if sweep.workers else sweep.submit.on != "local"
    if are_concurrent and any(getattr(config, "duration", Duration(steps=1)).seconds for config in valid):
        message = (
            "workers: trials with a budget in duration.seconds must run one at a time: use 1 worker, or duration.steps"
        )
        return [(("workers",), message)]
    return []


def _locate_problem(sweep: SweepConfig, path: KeyPath, message: str) -> tuple[KeyPath, str]:
    """Return the path in the sweep of a problem of a trial, and its message with a hint for ranges."""
    located = _path_in_sweep(sweep, path)
    if located[:2] == ("search", "space") and "a whole number" in message:
        message += "; a range of whole numbers has int: true"
    return located, message


def _path_in_sweep(sweep: SweepConfig, path: KeyPath) -> KeyPath:
    """Turn a path in a trial into one in the sweep: the axis that set the value, or else the base."""
    dotted = ".".join(map(str, path))
    space = sweep.search.space if sweep.search else {}
    for block, keys in ((("grid",), sweep.grid), (("zip",), sweep.zip), (("search", "space"), space)):
        for key in keys:
            if dotted == key or dotted.startswith(f"{key}.") or key.startswith(f"{dotted}."):
                return (*block, key)
    for index, condition in enumerate(sweep.conditions):
        for key in condition.set:
            if dotted == key or dotted.startswith(f"{key}."):
                return ("conditions", index, "set", key)
    return ("base", *path)


def _name_problems(sweep: SweepConfig, valid: list[ExperimentConfig]) -> Problems:
    """Return conditions on keys that no trial sets, which would never hold, and metrics that are not reported."""
    trials = sweep.trials()
    problems: Problems = []
    for index, condition in enumerate(sweep.conditions):
        for key in condition.when:
            if all(overrides.get(trial.raw, key) is None for trial in trials):
                problems.append((("conditions", index, "when", key), f"no trial sets {key!r}; write it into base"))
    known = registry.get_experiment(valid[0].experiment).reported_metrics(valid[0])
    for key in sweep.diverged_values:
        if not is_known(key, known):
            problems.append((("diverged_values", key), unknown_metric("diverged_values", key, known)))
    if sweep.search and not is_known(sweep.search.metric, known):
        problems.append((("search", "metric"), unknown_metric("search.metric", sweep.search.metric, known)))
    return problems


def _expectation_problems(sweep: SweepConfig, valid: list[ExperimentConfig]) -> Problems:
    """Return expectations on metrics that no trial reports, or on keys that no trial has."""
    metrics = registry.get_experiment(valid[0].experiment).reported_metrics(valid[0])
    flat = [{k: v for k, v in flatten(config.model_dump()).items() if k != "seed"} for config in valid]
    sweep_metrics = registry.get_experiment(sweep.experiment).reported_metrics(sweep)
    problems: Problems = []
    for path, rule in validation.rules_of(sweep):
        for term in rule.terms:
            known = metrics if term.function else sweep_metrics
            if term.metric and not is_known(term.metric, known):
                functions = (
                    "; for a sweep write a function, for example `mean(METRIC)`"
                    if is_known(term.metric, metrics)
                    else ""
                )
                problems.append((path, unknown_metric(term.text, term.metric, known) + functions))
            elif not any(term_applies(term, keys) for keys in flat):
                seeds = "; settings are means over seeds" if "seed" in dict(term.filters) else ""
                problems.append((path, f"{term.text!r}: no trial has {_describe_filters(term)}{seeds}"))
    return problems


def term_applies(term: expectations.Term, keys: Mapping[str, Any]) -> bool:
    """Return whether a configuration passes the filters of a term."""
    has_key = term.by == "" or term.by in keys
    return has_key and all(key in keys and expectations.values_equal(keys[key], value) for key, value in term.filters)


def _describe_filters(term: expectations.Term) -> str:
    parts = [f"{key}={grid.format_value(value)}" for key, value in term.filters]
    return ", ".join([*parts, *([f"the key {term.by}"] if term.by else [])])


def resolve_datasets(sweep: SweepConfig, base: Path, policy: DownloadPolicy) -> None:
    """Download the data sets that the trials name, if that is quick.

    The data set of the base has been resolved before. Data sets that the sweep varies have no fallback: if only some
    trials used another one, results would not be comparable.

    Raises:
        DataError: if one of them is not available.
    """
    blocks = [getattr(config, "data", None) for _, config in trial_configs(sweep, base)]
    for name in sorted({name for block in blocks if isinstance(block, DataConfig) for name in block.names}):
        resolve_dataset(DataConfig(name=name), policy)


def create_trials(sweep: SweepConfig, base: Path, out: RunDir) -> None:
    """Write a run directory for every trial, all or none of them, and copy the user's files beside the sweep.

    The trials of a search are added later, one by one.
    """
    partial = out.folder("trials.partial")
    for name, config in [] if sweep.search else trial_configs(sweep, base):
        (partial / name).mkdir(exist_ok=True)
        _write_trial(partial / name, config, base, _threads_per_trial(sweep))
    user_code.snapshot_user_code(sweep.model_dump(), base, out.path)
    portability.replace(partial, out.path / "trials")
    atomic.sync_directory(out.path)


def add_trial(sweep: SweepConfig, out: RunDir, number: int, changes: grid.Changes) -> Path:
    """Write the run directory of one more trial and return it.

    Raises:
        ConfigError: if the trial is not valid.
    """
    trial = sweep.apply_changes([changes], number)[0]
    config, problems = validation.check(trial.raw, out.path)
    if config is None:
        hint = "narrow search.space, or tie keys together with conditions"
        raise ConfigError(f"the search proposed {trial.name}, which is not valid: {problems[0][1]}", hint)
    partial = out.path / "trial.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    out.folder(partial.name)
    _write_trial(partial, config, out.path, _threads_per_trial(sweep))
    adaptive.write_changes(partial, changes)
    if (rungs := adaptive.rungs_of(sweep)) is not None:
        rung.write(partial, rungs.rung(0))
    path = Path(out.path, "trials", trial.name)
    portability.replace(partial, path)
    atomic.sync_directory(path.parent)
    return path


def _write_trial(folder: Path, config: ExperimentConfig, base: Path, threads: int) -> None:
    copied = user_code.copy_user_code(config, base, folder)
    if getattr(copied, "threads", None) is None:
        copied = copied.model_copy(update={"threads": threads})
    atomic.write_text(folder / "config.yaml", copied.to_yaml())


def _threads_per_trial(sweep: SweepConfig) -> int:
    """Return the threads of a trial that does not configure them: its share of this machine or of its node."""
    if sweep.submit.on != "local":
        return int(sweep.submit.cpus)
    return process_group.threads_per_process(sweep.workers or 1)
