"""Open the files of a folder that somebody else may have written, such as a run directory.

Only regular files of bounded size are opened, and never through a link: a FIFO would block, a device never ends, and a
link would let the folder's author read or change files outside of it.
"""

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from cvlab.portability import OPEN_FLAGS, OPEN_FOLDER_FLAGS, OPENS_RELATIVE


class IrregularFileError(OSError):
    """A path of a run directory is not the regular file that it should be, or too large."""


def open_regular(path: Path, flags: int) -> int:
    """Open a file as `os.open` does; return its descriptor.

    Raises:
        IrregularFileError: It is a link or not a regular file; or, to be written, it has several names.
        OSError: It cannot be opened for another reason.
    """
    if path.is_symlink():
        raise IrregularFileError("it is a link")
    is_written = bool(flags & (os.O_WRONLY | os.O_RDWR))
    try:
        descriptor = os.open(path, flags | OPEN_FLAGS, 0o666)
    except OSError:
        if os.path.lexists(path) and not path.is_file():  # a FIFO without a reader, a folder, a socket
            raise IrregularFileError("it is not a regular file") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise IrregularFileError("it is not a regular file")
    if is_written and status.st_nlink > 1:  # a change would also appear below the other names
        os.close(descriptor)
        raise IrregularFileError("it is a hard link")
    return descriptor


def open_binary(path: Path, max_bytes: int) -> BinaryIO:
    """Open a regular file of at most `max_bytes` bytes for reading; raises as `open_regular`."""
    descriptor = open_regular(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    if size > max_bytes:
        os.close(descriptor)
        raise IrregularFileError(f"it has {size} bytes, more than {max_bytes}")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes; raises as `open_regular`."""
    with open_binary(path, max_bytes) as file:
        return file.read(max_bytes)


def read_below(folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes below a folder, whose path has no link.

    Each folder on the way is opened in the one before, where the system can do this, so that no change in between leads
    elsewhere.

    Raises:
        IrregularFileError: A part of the path is a link, `..` or absolute, or the file is not regular or too large.
        OSError: It cannot be opened for another reason.
    """
    require_no_links(folder, name)
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).anchor:  # Windows' `C:name` is not absolute
        raise IrregularFileError("it is not below the run directory")
    if not OPENS_RELATIVE:
        return _read_all(open_regular(folder / name, os.O_RDONLY), max_bytes)
    with contextlib.ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY | OPEN_FOLDER_FLAGS)
        stack.callback(os.close, descriptor)
        for part in parts[:-1]:
            descriptor = os.open(part, os.O_RDONLY | OPEN_FOLDER_FLAGS | OPEN_FLAGS, dir_fd=descriptor)
            stack.callback(os.close, descriptor)
        return _read_all(os.open(parts[-1], os.O_RDONLY | OPEN_FLAGS, dir_fd=descriptor), max_bytes)


def _read_all(descriptor: int, max_bytes: int) -> bytes:
    """Return the content of an open file and close it; IrregularFileError if it is not regular, or too large."""
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IrregularFileError("it is not a regular file")
        if status.st_size > max_bytes:
            raise IrregularFileError(f"it has {status.st_size} bytes, more than {max_bytes}")
        return file.read(max_bytes)


def read_tail(path: Path, max_bytes: int) -> bytes:
    """Return the last `max_bytes` bytes of a regular file of any size; raises as `open_regular`."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
        return file.read(max_bytes)


def size_of(path: Path) -> int:
    """Return the number of bytes of a regular file, 0 if there is none; raises as `open_regular`."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def require_no_links(folder: Path, name: str) -> None:
    """Raise IrregularFileError if a path below a folder is a link, or leads through one."""
    path = folder
    for part in Path(name).parts:
        path = path / part
        if path.is_symlink():
            raise IrregularFileError(f"{path.name} is a link")
