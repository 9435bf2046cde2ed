"""`cvlab sweep`: start a sweep, or resume one that was interrupted."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.api import run
from cvlab.config import loading
from cvlab.config.schema import ExperimentConfig
from cvlab.data.resolve import DownloadPolicy
from cvlab.runs import trust, user_code
from cvlab.runs.find import config_path, list_runs
from cvlab.runs.records import ENDED, read_status
from cvlab.storage import atomic, lock
from cvlab.sweeps.experiment import SweepExperiment

Result = dict[str, Any]
LOCK, START_SECONDS = ".sweeps.lock", 60.0  # in the folder of the runs
EXECUTION_KEYS = ("workers", "submit")  # of a sweep, on which its results do not depend


def start(loaded: loading.Loaded, policy: DownloadPolicy, root: Path, fresh: bool) -> Result:
    """Run a sweep, or resume the newest one with the same configuration that was interrupted.

    Args:
        loaded: The configuration.
        policy: What may be done about missing data.
        root: The folder of the runs.
        fresh: Start anew in any case.

    Returns:
        The result of the sweep, see `api.run.result`.
    """
    experiment = registry.get_experiment(SweepExperiment.name)
    experiment.plan(loaded.config, loaded.base)  # fails before anything is written if an executor is not installed
    loaded = dataclasses.replace(loaded, config=experiment.prepare(loaded, policy))
    if fresh:
        return run.start(loaded, policy, root)
    with _only_start(root):  # of two equal sweeps that start at once the second one finds the first
        unfinished = find_unfinished(loaded, root)
        path = unfinished or run.create(loaded, root)
    if unfinished is not None:
        console.info(f"resuming the interrupted sweep {unfinished}; --fresh starts a new one")
    return run.resume(path, {key: getattr(loaded.config, key) for key in EXECUTION_KEYS})


@contextlib.contextmanager
def _only_start(root: Path) -> Iterator[None]:
    """Wait until no other sweep below `root` is looking for an interrupted one, or being created."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.disk_error(root, error) from error
    with lock.exclusive(root / LOCK, START_SECONDS):
        yield


def find_unfinished(loaded: loading.Loaded, root: Path) -> Path | None:
    """Return the newest sweep below `root` with the same configuration and user files that has not ended, or None."""
    config = loaded.config
    for path in reversed(list_runs(root)):
        try:
            status = read_status(path)
            if status.get("experiment", SweepExperiment.name) != SweepExperiment.name or status.get("status") in ENDED:
                continue
            trust.require_trust(path, is_trusted=False)
            other = loading.load(str(config_path(path))).config
        except Exception:  # it is damaged or from elsewhere; or importing the user's file, which may raise anything
            continue
        is_same = _identity(other) == _identity(user_code.rewrite_paths(config)) and (path / "trials").is_dir()
        if is_same and user_code.is_unchanged(config.model_dump(), loaded.base, path):
            return path
    return None


def _identity(config: ExperimentConfig) -> str:
    return config.model_copy(update={key: type(config).model_fields[key].default for key in EXECUTION_KEYS}).to_yaml()
