"""`cvlab runs COMMAND`: tag, note, star, remove, prune, export and import runs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cvlab.errors import ConfigError
from cvlab.runs import annotations, archive, query, removal
from cvlab.runs.annotations import Annotations
from cvlab.runs.find import find_run, list_runs

Result = dict[str, Any]


def _annotate(paths: Sequence[Path], change: Callable[[Annotations], Annotations]) -> Result:
    rows = [{"run": path.name, **asdict(annotations.update(path, change))} for path in paths]
    return {"ok": True, "runs": rows}


def tag(root: Path, runs: Sequence[str], add: Sequence[str], remove: Sequence[str]) -> Result:
    """Add tags to runs and remove tags; return the annotations of each.

    Raises:
        ConfigError: A tag is not valid, or there is nothing to do.
        RunDirError: There is no such run, or its folder cannot be written.
    """
    if not add and not remove:
        raise ConfigError("no tag is named", "--add TAG adds one, --remove TAG removes one")
    added, removed = tuple(map(annotations.check_tag, add)), tuple(map(annotations.check_tag, remove))
    return _annotate(query.select(runs, root), lambda current: annotations.with_tags(current, added, removed))


def note(root: Path, run: str, text: str) -> Result:
    """Replace the note of a run; an empty text removes it."""
    return _annotate([find_run(run, root)], lambda current: replace(current, note=text.strip()))


def star(root: Path, runs: Sequence[str], starred: bool) -> Result:
    """Star runs, or remove their stars."""
    return _annotate(query.select(runs, root), lambda current: replace(current, starred=starred))


def remove(root: Path, runs: Sequence[str], dry_run: bool) -> Result:
    """Remove runs; all are checked before the first is removed.

    Returns:
        `runs`: name and bytes of each; `bytes`: all that is freed, also of leftovers of removals that were killed.

    Raises:
        RunDirError: A run is running or a trial of a sweep, or its folder cannot be written.
    """
    paths = query.select(runs, root)
    for path in paths:
        removal.require_removable(path)
    if dry_run:
        rows = [{"run": path.name, "bytes": removal.num_bytes(path)} for path in paths]
        return {"ok": True, "dry_run": True, "runs": rows, "bytes": sum(row["bytes"] for row in rows)}
    leftover = removal.empty_trash(root)
    rows = [{"run": path.name, "bytes": removal.remove(path)} for path in paths]
    for folder in {root, *(path.parent for path in paths)}:
        removal.repoint_latest(folder)
    return {"ok": True, "dry_run": False, "runs": rows, "bytes": leftover + sum(row["bytes"] for row in rows)}  # type: ignore[misc]


def prune(root: Path, runs: Sequence[str], dry_run: bool) -> Result:
    """Remove checkpoints of runs that have ended, but the best and the last of each.

    Args:
        root: The folder of the runs.
        runs: Runs and queries; empty for all runs.
        dry_run: Remove nothing.

    Returns:
        `runs`: of each run with something to remove, and of each named run that is skipped, see `removal.prune`;
        `bytes`: all that is freed.
    """
    paths = query.select(runs, root) if runs else list_runs(root)
    rows = [removal.prune(path, dry_run) for path in paths]
    freed = sum(row["bytes"] for row in rows) + (0 if dry_run else removal.empty_trash(root))
    shown = [row for row in rows if row["removed"] or (runs and "skipped" in row)]
    return {"ok": True, "dry_run": dry_run, "runs": shown, "bytes": freed}


def export_archive(root: Path, runs: Sequence[str], file: Path, with_checkpoints: bool) -> Result:
    """Write runs into an archive.

    Args:
        root: The folder of the runs.
        runs: Runs and queries.
        file: The archive, which must not exist.
        with_checkpoints: Without them the runs cannot be resumed from it.

    Returns:
        `file`, `bytes` (its size), and `runs`: name, number of files and bytes of each.
    """
    rows = archive.export_runs(query.select(runs, root), file, with_checkpoints)
    return {"ok": True, "file": str(file), "bytes": file.stat().st_size, "runs": rows}


def import_archive(root: Path, file: Path) -> Result:
    """Unpack the runs of an archive below the folder of the runs; `runs` are their names and what they have."""
    return {"ok": True, "runs": archive.import_runs(file, root)}
