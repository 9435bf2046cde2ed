"""Weights that a training of ours has left in its run directory, or that come along, by what a user calls them."""

import os
from pathlib import Path

from cvlab.errors import DataError, RunDirError
from cvlab.runs.find import find_run, runs_root

BUNDLED_WEIGHTS = Path(__file__).parent.parent.parent / "assets" / "weights"


def absolute(name: str | None) -> str | None:
    """Return the path that is meant by weights: a file, a run's folder, or a run's name."""
    if name is None or os.path.lexists(name):
        return os.path.abspath(name) if name else name
    try:
        return str(find_run(name, runs_root(None)).absolute())
    except RunDirError:
        return os.path.abspath(name)


def resolve_weights_path(name: str, file: str, kind: str) -> Path:
    """Return the weights file that is meant: itself, or the one called `file` of a run that trained a `kind`."""
    path = Path(name)
    if not path.is_dir():
        return path
    if not (path / file).is_file():
        raise DataError(f"{path}: this run has no {file}", f"name a run of `cvlab train` that ended, of a {kind}")
    return path / file
