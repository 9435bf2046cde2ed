"""A sweep's arms as configurations: validated with the sweep, written as run directories before the first one runs."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.config import expectations, overrides, validation
from cvlab.config.schema import DataConfig, Duration, ExperimentConfig, RunConfig
from cvlab.config.strict_yaml import KeyPath
from cvlab.config.validation import Problems, is_known, unknown_metric
from cvlab.data.resolve import DownloadPolicy, resolve_dataset
from cvlab.distributed import process_group
from cvlab.errors import ConfigError
from cvlab.reports.compare import flatten
from cvlab.runs import user_code
from cvlab.runs.run_dir import RunDir
from cvlab.storage import atomic
from cvlab.sweeps import adaptive, grid
from cvlab.sweeps.config import SweepConfig


def trial_configs(sweep: SweepConfig, base: Path) -> list[tuple[str, RunConfig]]:
    """Return the name and the configuration of every arm; ConfigError where one is not valid."""
    found = []
    for arm in sweep.arms():
        config, wrong = validation.check(arm.raw, base)
        if config is None:
            raise ConfigError(f"{arm.name}: {wrong[0][1]}")
        assert isinstance(config, RunConfig)
        found.append((arm.name, config))
    return found


def sweep_problems(sweep: SweepConfig, base: Path) -> Problems:
    """Return what is wrong with the arms and with the expectations over them, each with its place in the sweep."""
    own = [key for key in overrides.NOT_INHERITED if key in sweep.base]
    if own:
        return [(("base", own[0]), f"base.{own[0]}: an arm has none; put it beside `base`")]
    if sweep.base.get("profiles"):
        return [(("base", "profiles"), "base.profiles: an arm has one size; name it by base.profile beside base.from")]
    if sweep.base.get("experiment") == sweep.experiment:
        return [(("base", "experiment"), "a sweep of sweeps is not possible")]
    found: dict[tuple[KeyPath, str], None] = {}
    valid = []
    for arm in sweep.arms():
        config, wrong = validation.check(arm.raw, base)
        found |= {_locate_problem(sweep, path, message): None for path, message in wrong}
        valid.append(config)
    whole = [config for config in valid if config is not None]
    return (
        list(found)
        or _time_budget_problems(sweep, whole)
        or _name_problems(sweep, whole)
        or _expectation_problems(sweep, whole)
    )


def _time_budget_problems(sweep: SweepConfig, valid: list[ExperimentConfig]) -> Problems:
    """Refuse a budget of seconds for arms that would take the machine from each other."""
    together = sweep.workers > 1 if sweep.workers else sweep.submit.on != "local"
    if together and any(getattr(config, "duration", Duration(steps=1)).seconds for config in valid):
        message = "workers: arms with a budget in duration.seconds must run alone; 1 at a time, or give duration.steps"
        return [(("workers",), message)]
    return []


def _locate_problem(sweep: SweepConfig, path: KeyPath, message: str) -> tuple[KeyPath, str]:
    """Return the place in the sweep of what is wrong with an arm, and the message, with a hint for ranges."""
    place = _path_in_sweep(sweep, path)
    if place[:2] == ("search", "space") and "a whole number" in message:
        message += "; a range of whole numbers has int: true"
    return place, message


def _path_in_sweep(sweep: SweepConfig, path: KeyPath) -> KeyPath:
    """Turn a place in an arm into one in the sweep: the axis that gave the value, else the base."""
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
    """Find conditions on keys that no arm gives, which would never hold, and metrics that are not measured."""
    arms = sweep.arms()
    wrong: Problems = []
    for index, condition in enumerate(sweep.conditions):
        for key in condition.when:
            if all(overrides.get(arm.raw, key) is None for arm in arms):
                wrong.append((("conditions", index, "when", key), f"no arm gives {key!r}; write it into base"))
    known = registry.get_experiment(valid[0].experiment).reported_metrics(valid[0])
    for key in sweep.diverged_counts_as:
        if not is_known(key, known):
            wrong.append((("diverged_counts_as", key), unknown_metric("diverged_counts_as", key, known)))
    if sweep.search and not is_known(sweep.search.metric, known):
        wrong.append((("search", "metric"), unknown_metric("search.metric", sweep.search.metric, known)))
    return wrong


def _expectation_problems(sweep: SweepConfig, valid: list[ExperimentConfig]) -> Problems:
    """Find expectations that speak of what no arm measures, or of keys that no arm has."""
    metrics = registry.get_experiment(valid[0].experiment).reported_metrics(valid[0])
    flat = [{k: v for k, v in flatten(config.model_dump()).items() if k != "seed"} for config in valid]
    own = registry.get_experiment(sweep.experiment).reported_metrics(sweep)
    wrong: Problems = []
    for path, rule in validation.rules_of(sweep):
        for term in rule.terms:
            known = metrics if term.function else own
            if term.metric and not is_known(term.metric, known):
                functions = "; over arms write for example `mean(METRIC)`" if is_known(term.metric, metrics) else ""
                wrong.append((path, unknown_metric(term.text, term.metric, known) + functions))
            elif not any(term_applies(term, keys) for keys in flat):
                seeds = "; settings are means over seeds" if "seed" in dict(term.filters) else ""
                wrong.append((path, f"{term.text!r}: no arm has {_describe_filters(term)}{seeds}"))
    return wrong


def term_applies(term: expectations.Term, keys: Mapping[str, Any]) -> bool:
    """Whether a configuration is one that a term speaks of."""
    told = term.by == "" or term.by in keys
    return told and all(key in keys and expectations.values_equal(keys[key], value) for key, value in term.filters)


def _describe_filters(term: expectations.Term) -> str:
    parts = [f"{key}={grid.format_value(value)}" for key, value in term.filters]
    return ", ".join([*parts, *([f"the key {term.by}"] if term.by else [])])


def resolve_datasets(sweep: SweepConfig, base: Path, policy: DownloadPolicy) -> None:
    """Fetch the data sets that the arms name, if that is quick; DataError where one of them is not to be had.

    The base's own set has been settled before. One that the sweep varies takes no fallback: with another set in some
    arms only, what is not alike would be compared.
    """
    blocks = [getattr(config, "data", None) for _, config in trial_configs(sweep, base)]
    for name in sorted({block.name for block in blocks if isinstance(block, DataConfig)}):
        resolve_dataset(DataConfig(name=name), policy)


def create_trials(sweep: SweepConfig, base: Path, out: RunDir) -> None:
    """Write a run directory for every arm, all or none of them, and copy the user's files beside the sweep.

    The arms of a search come later, one by one.
    """
    partial = out.folder("arms.partial")
    for name, config in [] if sweep.search else trial_configs(sweep, base):
        (partial / name).mkdir(exist_ok=True)
        _write_trial(partial / name, config, base, _threads_per_trial(sweep))
    user_code.snapshot_user_code(sweep.model_dump(), base, out.path)
    partial.replace(out.path / "arms")
    atomic.sync_directory(out.path)


def add_trial(sweep: SweepConfig, out: RunDir, number: int, changes: grid.Changes) -> Path:
    """Write the run directory of one more trial, whole or not at all. ConfigError where it is not valid."""
    arm = sweep.laid_over([changes], number)[0]
    config, wrong = validation.check(arm.raw, out.path)
    if config is None:
        hint = "narrow search.space, or tie the keys by conditions"
        raise ConfigError(f"the search came to {arm.name}, which is not valid: {wrong[0][1]}", hint)
    partial = out.path / "arm.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    out.folder(partial.name)
    _write_trial(partial, config, out.path, _threads_per_trial(sweep))
    adaptive.write_changes(partial, changes)
    made = Path(out.path, "arms", arm.name)
    partial.replace(made)
    atomic.sync_directory(made.parent)
    return made


def _write_trial(folder: Path, config: ExperimentConfig, base: Path, threads: int) -> None:
    brought = user_code.copy_user_code(config, base, folder)
    if getattr(brought, "threads", None) is None:
        brought = brought.model_copy(update={"threads": threads})
    atomic.write_text(folder / "config.yaml", brought.to_yaml())


def _threads_per_trial(sweep: SweepConfig) -> int:
    """Return the threads of an arm where its configuration does not say: its share of this machine, or of its node."""
    if sweep.submit.on != "local":
        return int(sweep.submit.cpus)
    return process_group.threads_per_process(sweep.workers or 1)
