"""`cvlab sweep` and `cvlab verify`: many runs, as one command."""

import dataclasses
from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.api import run
from cvlab.config import loading
from cvlab.config.schema import ExperimentConfig
from cvlab.data.resolve import DownloadPolicy
from cvlab.runs import user_code
from cvlab.runs.find import config_path, list_runs
from cvlab.runs.records import read_status
from cvlab.sweeps.experiment import SweepExperiment

Result = dict[str, Any]
WHERE = ("workers", "submit")  # keys of a sweep on which its results do not depend


def start(loaded: loading.Loaded, policy: DownloadPolicy, root: Path, fresh: bool) -> Result:
    """Run a sweep: go on with the newest one of the same configuration that has not ended, unless `fresh`."""
    experiment = registry.get_experiment(SweepExperiment.name)
    experiment.plan(loaded.config, loaded.base)  # what is not installed is said before anything is touched
    loaded = dataclasses.replace(loaded, config=experiment.prepare(loaded, policy))
    unfinished = None if fresh else find_unfinished(loaded, root)
    if unfinished is None:
        return run.start(loaded, policy, root)
    console.info(f"going on with {unfinished}, which has not ended (--fresh starts anew)")
    return run.resume(unfinished, {key: getattr(loaded.config, key) for key in WHERE})


def find_unfinished(loaded: loading.Loaded, root: Path) -> Path | None:
    """Return the newest sweep below `root` that has stopped before its end and varies the same, with the same files."""
    chosen = loaded.config
    for path in reversed(list_runs(root)):
        status = read_status(path)
        if status.get("experiment") != SweepExperiment.name or status.get("status") not in ("interrupted", "failed"):
            continue
        try:
            other = loading.load(str(config_path(path))).config
        except Exception:  # an old one's own file may raise anything when it is imported
            continue
        same = _identity(other) == _identity(user_code.rewrite_paths(chosen)) and (path / "arms").is_dir()
        if same and user_code.is_unchanged(chosen.model_dump(), loaded.base, path):
            return path
    return None


def _identity(chosen: ExperimentConfig) -> str:
    return chosen.model_copy(update={key: type(chosen).model_fields[key].default for key in WHERE}).to_yaml()
