"""Resolve the weights of a trained model: a file, a run directory, a run's name, or the bundled weights."""

import os
from pathlib import Path

from cvlab.errors import DataError, RunDirError
from cvlab.runs.find import find_run, runs_root

BUNDLED_WEIGHTS = Path(__file__).parent.parent.parent / "assets" / "weights"


def absolute_weights_path(name: str | None, file_name: str, what: str) -> str | None:
    """Return the absolute path of weights that are given as a file, a run directory or the name of a run.

    Args:
        name: What is given; `latest` is the newest run that has the file.
        file_name: The file with the weights in a run directory.
        what: What such a run is, for error messages.
    """
    if name is None or os.path.lexists(name):
        return os.path.abspath(name) if name else name
    try:
        return str(find_run(name, runs_root(None), lambda path: (path / file_name).is_file(), what).absolute())
    except RunDirError:
        return os.path.abspath(name)


def resolve_weights_path(name: str, file_name: str, model_kind: str) -> Path:
    """Return the path of a weights file: `name` itself, or `file_name` in the run directory `name`.

    Raises DataError if `name` is a run directory without such a file.
    """
    path = Path(name)
    if not path.is_dir():
        return path
    if not (path / file_name).is_file():
        raise DataError(f"{path}: this run has no {file_name}", f"name a completed `cvlab train` run of a {model_kind}")
    return path / file_name
