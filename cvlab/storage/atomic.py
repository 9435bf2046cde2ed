"""Atomic writes: after a kill, a power cut or a full disk a file has its old or its new content, never a part of it.

The order is: temporary file in the same directory, flush, fsync, rename, fsync of the directory. Without any one of
these, simulated power cuts lose acknowledged writes (tests/storage/test_atomic.py).
"""

import contextlib
import errno
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cvlab import console, portability
from cvlab.errors import RunDirError
from cvlab.storage.failpoints import reach
from cvlab.storage.regular_files import IrregularFileError

TEMPORARY = ".tmp"
UNSUPPORTED = frozenset(  # what file systems answer that lack a system call: network shares, cloud drives, FAT
    (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOLCK, errno.EINVAL, errno.ENOTTY)
)
LEFTOVER_SECONDS = 600.0  # age from which on a temporary file is not being written any more


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


UMASK = _umask()  # read once, at import, before any thread could create a file in between


class _FirstError:
    """A file that remembers the first OSError of a write; torch.save replaces it by an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        reach("mid_write")
        return written

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically and durably; no temporary file is left behind.

    Args:
        path: The file.
        fill: Called as `fill(file)`; writes the content.

    Raises:
        RunDirError: The file or folder cannot be written.
    """
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", suffix=TEMPORARY, dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            reach("open")
            with ignore_unsupported():
                portability.set_mode(file.fileno(), 0o666 & ~UMASK)  # mkstemp creates it with mode 0600
            recorder = _FirstError(file)
            try:
                fill(recorder)  # type: ignore[arg-type]
            except Exception:
                if recorder.error is not None:
                    raise recorder.error from None
                raise
            file.flush()
            reach("before_fsync")
            sync_file(file.fileno(), path)
        reach("before_rename")
        portability.replace(Path(temporary), path)
        reach("after_rename")
        sync_directory(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably, in UTF-8; what it cannot encode is escaped."""
    write(path, lambda file: file.write(text.encode(errors="backslashreplace")))


@contextlib.contextmanager
def ignore_unsupported() -> Iterator[None]:
    """Continue if the file system lacks a system call that a run can do without."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_file(descriptor: int, path: Path) -> None:
    """Make the content of an open file durable; a file system that cannot do this is reported once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_not_durable(path.parent, error.strerror or str(error))


@functools.cache
def _warn_not_durable(folder: Path, reason: str) -> None:
    console.info(f"warning: {folder}: its file system has no fsync ({reason}): a power cut may lose files")


def sync_directory(folder: Path) -> None:
    """Make renames, links and removals in a folder durable, where its file system has this for folders."""
    reach("before_dirsync")
    with ignore_unsupported():
        portability.sync_folder(folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, replacing it; a durable copy where the file system has no hard links."""
    temporary = target.parent / f".{target.name}{TEMPORARY}"
    try:
        with contextlib.suppress(OSError):
            temporary.unlink()
        os.link(source, temporary)
    except OSError:  # for whatever reason; if the disk cannot be written, the copy raises the error
        with source.open("rb") as content:
            write(target, lambda file: shutil.copyfileobj(content, file))
        return
    portability.replace(temporary, target)
    with contextlib.suppress(OSError):
        temporary.unlink()  # rename(2) does nothing if both names are links to the same file already
    sync_directory(target.parent)


def remove_stale_temporaries(folder: Path, pattern: str = f".*{TEMPORARY}", is_locked: bool = False) -> None:
    """Remove temporary files that a killed process has left behind.

    Args:
        folder: The folder, without those in it.
        pattern: A glob pattern of their names.
        is_locked: Whether the caller holds the lock of the folder. Otherwise young files, which another process may be
            writing, stay.
    """
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if is_locked or time.time() - leftover.lstat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


DISK_HINT = "free space, or choose another folder with --runs-dir; earlier files are intact"


def disk_error(path: Path, error: OSError, hint: str = DISK_HINT) -> RunDirError:
    """Return the error of a disk as a RunDirError of one line."""
    if error.errno == errno.ENOENT and hint == DISK_HINT and not path.parent.exists():
        hint = "its folder was removed; start again"
    if isinstance(error, IrregularFileError):
        hint = "the run directory was changed; remove it, or start again with --runs-dir"
    elif error.errno in UNSUPPORTED:
        hint = "the file system does not support this; choose another folder with --runs-dir"
    return RunDirError(f"{path}: {error.strerror or error}", hint)
