"""Create, list and find run directories."""

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from cvlab import portability, registry
from cvlab.config import overrides, strict_yaml
from cvlab.errors import RunDirError
from cvlab.runs.records import is_run, read_status
from cvlab.runs.run_dir import RunDir
from cvlab.storage import atomic

DIRECTORY = re.compile(r"\d{8}-\d{6}-(.+)-[0-9a-f]{4}")
LATEST = "latest"  # instead of a run's name


def runs_root(folder: str | None = None) -> Path:
    """Return the folder of all runs: the argument, else $CVLAB_RUNS, else ./runs."""
    return Path(
        folder or os.environ.get("CVLAB_RUNS") or "runs"
    ).expanduser()  # `--runs-dir=~/r` is not expanded by a shell


def create_run(root: Path, name: str, on_log: Callable[[str], None] | None = None, is_latest: bool = True) -> RunDir:
    """Create a run directory below `root` and point the link `latest` to it.

    Args:
        root: The folder of all runs.
        name: Name of the run, part of the name of its directory.
        on_log: Called with each line that goes into its log.
        is_latest: Whether the link is set.

    Raises:
        RunDirError: The file or folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for _ in range(20):
            stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
            path = root / f"{stamp}-{name}-{secrets.token_hex(2)}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            if is_latest:
                point_latest(root, path)
            return RunDir(path, on_log)
    except OSError as error:
        raise atomic.disk_error(root, error) from error
    raise RunDirError(f"{root}: no free name for a run", "try again")


def point_latest(root: Path, path: Path) -> None:
    """Point the link `latest` below `root` to a run, where the file system has links."""
    with contextlib.suppress(OSError):  # without links the file system only lacks the shortcut
        portability.point_link(root / LATEST, path.name)


def configured_name(directory: str) -> str:
    """Return the `name` of the configuration in the name of a run directory, which may be renamed."""
    match = DIRECTORY.fullmatch(directory)
    return match[1] if match else directory


def config_path(path: Path) -> Path:
    """Return the path of a run's config.yaml; RunDirError if it is missing."""
    file = path / "config.yaml"
    if file.is_symlink():
        raise RunDirError(f"{file}: it is a link", "the run directory was changed")
    if not file.is_file():
        raise RunDirError(f"{path}: has no config.yaml", "it stopped before it was set up; start it again")
    return file


def read_config(path: Path, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """Return a run's configuration with dotted keys; RunDirError if it has none."""
    value = strict_yaml.read(config_path(path), loader).value
    return overrides.flatten(value) if isinstance(value, dict) else {}


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


def list_runs(root: Path) -> list[Path]:
    """Return all run directories below `root`, oldest first; RunDirError if `root` is not a folder."""
    if not root.is_dir():
        if root.exists():
            raise RunDirError(f"{root}: not a folder", "name one with --runs-dir")
        return []
    visible = (path for path in root.iterdir() if not path.name.startswith("."))  # a removed run is hidden at first
    return sorted(path for path in visible if not path.is_symlink() and path.is_dir() and is_run(path))


def find_interrupted_run(root: Path) -> Path:
    """Return the newest run that was interrupted and is not running again. RunDirError if there is none."""
    for path in reversed(list_runs(root)):
        with contextlib.suppress(RunDirError):  # a damaged status
            if read_status(path).get("status") == "interrupted":
                return path.resolve()
    raise RunDirError(f"no interrupted run in {root}", "name the run to resume; `cvlab runs` lists all")


def find_run(reference: str, root: Path, fits: Callable[[Path], bool] | None = None, what: str = "run") -> Path:
    """Return the run that a reference names.

    Args:
        reference: A path, `latest`, the name of a run, or a part of the name that only one run has.
        root: The folder of all runs.
        fits: Whether a run is of the kind that is meant; `latest` is the newest such run, and of several runs that have
            a part in their names the one that fits is taken. A run that is named in full is returned in any case.
        what: What is meant, for error messages.

    Raises:
        RunDirError: No run fits, or several do.
    """
    if not reference.strip():
        raise RunDirError("no run is named", "give a run directory, `latest`, or part of a run's name")
    for path in (Path(reference), root / reference):
        if (fits is None or reference != LATEST) and _is_folder(path) and is_run(path):
            return path.resolve()
    runs = list_runs(root)
    if reference == LATEST and runs:  # the link is missing, or its run, or a run of some kind is meant
        newest = next((path for path in reversed(runs) if fits is None or fits(path)), None)
        if newest is None:
            raise RunDirError(f"none of the {len(runs)} runs in {root} is {what}", "`cvlab runs` lists them")
        return newest.resolve()
    matches = [path for path in runs if reference in path.name]
    if fits is not None and len(matches) > 1:
        matches = [path for path in matches if fits(path)] or matches
    if len(matches) == 1:
        return matches[0].resolve()
    if matches:
        raise RunDirError(f"{reference!r} matches {len(matches)} runs", f"for example {matches[-1].name}")
    close = registry.closest_match(reference, [path.name for path in runs])
    hint = f"did you mean {close!r}?" if close else f"`cvlab runs` lists those below {root}"
    raise RunDirError(f"no run {reference!r}", hint)
