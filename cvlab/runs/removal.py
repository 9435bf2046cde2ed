"""Remove runs, and checkpoints that nobody needs.

A run is renamed to a hidden name first and then deleted, so that a kill leaves no half of a run in the list; what is
left under the hidden name is deleted by the next removal.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from cvlab import portability
from cvlab.errors import CheckpointError, RunDirError
from cvlab.runs import find
from cvlab.runs.records import ENDED, is_trial, read_status
from cvlab.storage import atomic
from cvlab.storage.failpoints import reach
from cvlab.storage.lock import RunLock, is_held

TRASH = ".trash-"  # prefix of the hidden name


def num_bytes(path: Path) -> int:
    """Return the bytes on the disk that removing a file or folder frees: a file with other names frees none."""
    inodes: dict[tuple[int, int], list[int]] = {}  # -> [names inside, names in all, bytes]
    folders = [(str(path.parent), [], [path.name])] if not path.is_dir() else os.walk(path)
    for folder, _, names in folders:
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - faster for thousands of files
                entry = inodes.setdefault((status.st_dev, status.st_ino), [0, status.st_nlink, status.st_size])
                entry[0] += 1
    return sum(size for inside, in_all, size in inodes.values() if inside >= in_all)


def obstacle(path: Path) -> str | None:
    """Return why a run must not be changed: it is running, or a trial of a sweep; None if it may."""
    if is_trial(path):
        return f"a trial of the sweep {path.parent.parent.name}, which needs it"
    if is_held(path):
        return "running"
    running = [trial.name for trial in find.list_runs(path / "trials") if is_held(trial)]
    return f"its trial {running[0]} is running" if running else None


def require_removable(path: Path) -> None:
    """Raise RunDirError if a run must not be removed."""
    reason = obstacle(path)
    if reason is not None:
        raise RunDirError(f"{path.name}: {reason}; nothing was removed", "stop it, or name other runs")


def remove(path: Path) -> int:
    """Remove a run directory, or the link to it that was named; return the bytes that it frees.

    Raises:
        RunDirError: It is running or a trial of a sweep, or its folder cannot be written.
    """
    require_removable(path)
    freed = num_bytes(path)
    lock = RunLock(path)
    lock.acquire()  # between the check and the rename nobody may resume it
    trash = path.parent / f"{TRASH}{path.name}"
    try:
        if trash.exists():
            shutil.rmtree(trash)
        if not portability.IS_POSIX:
            lock.release()  # no folder with an open file can be renamed there
        portability.replace(path, trash)
        reach("after_trash")
        atomic.sync_directory(path.parent)
        shutil.rmtree(trash)
    except OSError as error:
        raise atomic.disk_error(path, error, "change its permissions; a part may be left in a hidden folder") from error
    finally:
        lock.release()
    return freed


def empty_trash(root: Path) -> int:
    """Delete what killed removals have left below the folder of the runs; return the bytes that this frees."""
    freed = 0
    for trash in root.glob(f"{TRASH}*"):
        if trash.is_symlink() or not trash.is_dir() or is_held(trash):
            continue
        size = num_bytes(trash)
        with contextlib.suppress(OSError):
            shutil.rmtree(trash)
            freed += size
    return freed


def repoint_latest(root: Path) -> None:
    """Point the link `latest` to the newest run if the run that it pointed to is gone."""
    link = root / find.LATEST
    if link.is_symlink() and not link.exists():
        runs = find.list_runs(root)
        with contextlib.suppress(OSError):
            if runs:
                find.point_latest(root, runs[-1])
            else:
                link.unlink()


def prune(path: Path, dry_run: bool) -> dict[str, Any]:
    """Remove the checkpoints of a run that has ended, but the best and the last, which is verified first.

    Args:
        path: The run directory.
        dry_run: Remove nothing.

    Returns:
        `run`, `removed` (names of files), `bytes`; with `skipped`, why nothing was removed, if the run is not to be
        changed.

    Raises:
        RunDirError: The file or folder cannot be written.
    """
    result: dict[str, Any] = {"run": path.name, "removed": [], "bytes": 0}
    reason = obstacle(path)
    if reason is None and (status := read_status(path).get("status")) not in ENDED:
        reason = f"{status or 'not begun'}, so that it may be resumed"
    if reason is not None:
        return result | {"skipped": reason}
    old = _old_checkpoints(path / "checkpoints")
    if isinstance(old, str):
        return result | {"skipped": old}
    if not old:
        return result
    if dry_run:
        return result | {"removed": [file.name for file in old], "bytes": sum(map(_freed_by, old))}
    lock = RunLock(path)
    lock.acquire()
    try:
        for file in old:
            result["bytes"] += _freed_by(file)
            file.unlink()
            result["removed"].append(file.name)
    except OSError as error:
        raise atomic.disk_error(path / "checkpoints", error) from error
    finally:
        lock.release()
    return result


def _freed_by(file: Path) -> int:
    status = file.lstat()
    return status.st_size if status.st_nlink == 1 else 0


def _old_checkpoints(folder: Path) -> list[Path] | str:
    """Return the checkpoints that are neither the last nor the best; or why none may be removed."""
    if folder.is_symlink() or not folder.is_dir() or len(list(folder.glob("step_*.pt"))) < 2:
        return []
    from cvlab.runs import checkpoint  # loads torch

    steps = checkpoint.steps(folder)
    last = checkpoint.path_of(folder, steps[-1])
    try:
        checkpoint.load(last)
    except CheckpointError as error:
        return f"its last checkpoint is damaged: {error.message}"
    return [checkpoint.path_of(folder, step) for step in steps[:-1]]
