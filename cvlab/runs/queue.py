"""The queue of runs that wait to be run: a hidden folder beside the runs, with a folder for each item.

An item's folder is named after its place and its run directory, which holds everything else: configuration, status,
checkpoints. A process that runs an item holds the lock in the item's folder, and loses it when it dies, so that no item
is run by two processes at once and none is lost.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cvlab.errors import RunDirError
from cvlab.runs.records import require_folder
from cvlab.storage import atomic, lock

FOLDER, LOCK, WAIT_SECONDS = ".queue", "queue.lock", 60.0
ITEM = re.compile(r"(\d{6})-(.+)")
MAX_ITEMS = 10**6 - 1


class QueueItem(NamedTuple):
    """An item: its number, which is its place in the queue, its own folder and its run directory."""

    number: int
    folder: Path
    run: Path


def items(root: Path) -> list[QueueItem]:
    """Return the items of the queue below the folder of the runs, in order."""
    folder = root / FOLDER
    if not folder.is_dir():
        return []
    require_folder(folder)
    matches = ((path, ITEM.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    return [QueueItem(int(match[1]), path, root / match[2]) for path, match in matches if match and path.is_dir()]


def add(root: Path, run: Path) -> QueueItem:
    """Append a run directory to the queue; once this returns, the item survives a crash.

    Raises:
        RunDirError: The file or folder cannot be written.
    """
    folder = root / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.exclusive(folder / LOCK, WAIT_SECONDS):
            number = max((item.number for item in items(root)), default=0) + 1
            if number > MAX_ITEMS:
                raise RunDirError(f"{folder}: the queue is full", "`cvlab queue rm --done`")
            item = QueueItem(number, folder / f"{number:06d}-{run.name}", root / run.name)
            item.folder.mkdir()
            atomic.sync_directory(folder)
            atomic.sync_directory(root)
    except OSError as error:
        raise atomic.disk_error(folder, error) from error
    return item


def claim(item: QueueItem) -> lock.RunLock | None:
    """Take the lock of an item; None if another process has it or has removed the item.

    The process must not have the lock already: it would lose it.
    """
    if lock.is_held(item.folder):
        return None
    held = lock.RunLock(item.folder)
    try:
        held.acquire()
    except RunDirError:
        return None
    if not held.path.exists():  # removed meanwhile
        held.release()
        return None
    return held


def remove(item: QueueItem, held: lock.RunLock) -> None:
    """Remove an item whose lock is held; its run directory stays."""
    try:
        held.path.unlink(missing_ok=True)
        item.folder.rmdir()
        atomic.sync_directory(item.folder.parent)
    except OSError as error:
        raise atomic.disk_error(item.folder, error) from error
    finally:
        held.release()


def find(root: Path, references: list[str]) -> Iterator[QueueItem]:
    """Yield the items that numbers or names of runs refer to, each once.

    Raises:
        RunDirError: One of them refers to no item or to several.
    """
    known = items(root)
    chosen: dict[QueueItem, None] = {}
    for reference in references:
        matches = [item for item in known if reference in (str(item.number), item.run.name)]
        matches = matches or [item for item in known if not reference.isdigit() and reference in item.run.name]
        if len(matches) != 1:
            problem = f"{len(matches)} items match" if matches else "no item"
            raise RunDirError(f"{problem} {reference!r} in the queue", "`cvlab queue list` has their numbers")
        chosen[matches[0]] = None
    yield from chosen
