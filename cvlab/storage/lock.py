"""The lock of a run directory: `run.lock`, whose record lock ends with the process that holds it.

The file is opened once, because closing any other descriptor of it would release the lock on POSIX systems.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cvlab.errors import RunDirError
from cvlab.portability import try_lock
from cvlab.storage import atomic
from cvlab.storage.regular_files import open_regular

WAITS = (0.01, 0.05, 0.1, 0.0)  # seconds after each attempt


class RunLock:
    """The lock of a run directory, held from `acquire` to `release` or until the process dies."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self.descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; RunDirError with the holder if another process has it."""
        try:
            descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise atomic.disk_error(self.path, error) from error
        try:
            is_locked = _lock(descriptor)
            holder = "" if is_locked else os.read(descriptor, 1000).decode(errors="replace")
        except OSError as error:
            os.close(descriptor)
            raise no_locks_error(self.path.parent, error) from error
        if not is_locked:
            os.close(descriptor)
            raise RunDirError(f"{self.path.parent}: already running ({_describe(holder)})", "wait for it")
        self.descriptor = descriptor
        start = datetime.now(timezone.utc).isoformat(timespec="seconds")
        note = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start})
        try:
            with atomic.ignore_unsupported():  # the note only tells other processes who holds the lock
                os.ftruncate(descriptor, 0)
                os.write(descriptor, note.encode())  # at the start: nothing was read
        except OSError as error:
            self.release()
            raise atomic.disk_error(self.path, error) from error

    def release(self) -> None:
        """Release the lock; the file stays, because removing it could give two processes the lock."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def no_locks_error(folder: Path, error: OSError) -> RunDirError:
    """Return the error of a file system that cannot lock files."""
    return RunDirError(
        f"{folder}: its file system has no file locks ({error.strerror or error})",
        "choose a folder on a local disk with --runs-dir",
    )


def _lock(descriptor: int) -> bool:
    """Return whether the lock could be taken; waits for a process in `is_held`, which takes it for a moment."""
    for wait in WAITS:
        if try_lock(descriptor):
            return True
        time.sleep(wait)
    return False


@contextlib.contextmanager
def exclusive(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of a file, which is created if missing; RunDirError if it cannot be had within some seconds."""
    try:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise atomic.disk_error(path, error) from error
    try:
        _wait_for(descriptor, path, seconds)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    try:
        while not try_lock(descriptor):
            if time.monotonic() > deadline:
                raise RunDirError(f"{path}: another process holds it", "wait for it")
            time.sleep(max(WAITS))
    except OSError as error:
        raise no_locks_error(path.parent, error) from error


def is_held(folder: Path) -> bool:
    """Return whether a process other than this one holds the lock of a run directory."""
    path = folder / "run.lock"
    try:
        descriptor = open_regular(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    except OSError:  # no process can hold a lock that the file system does not have
        return False
    finally:
        os.close(descriptor)


def _describe(note: str) -> str:
    try:
        holder: dict[str, Any] = json.loads(note)
        return f"pid {holder['pid']} on {holder['host']} since {holder['start']}"
    except (ValueError, KeyError, TypeError):
        return "holder not known yet"
