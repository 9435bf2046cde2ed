"""Read annotation files of bounded size, with errors that name the file and the line."""

import os
from collections.abc import Sequence
from pathlib import Path

from cvlab.errors import DataError

MAX_BYTES = 5_000_000  # of one image's annotation file, or of a list


def read_bytes(path: Path, max_bytes: int = MAX_BYTES, hint: str = "name a file that can be read") -> bytes:
    """Read a file of at most `max_bytes`. Raises DataError otherwise, with `hint` if it cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}", hint) from error
    if len(raw) > max_bytes:
        raise DataError(f"{path}: larger than {max_bytes // 10**6} MB", "this is not an annotation file")
    return raw


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Raises DataError."""
    raw = read_bytes(path, max_bytes)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{raw[: error.start].count(10) + 1}: not UTF-8 text", "save it as UTF-8") from error


def read_start(path: Path, num_bytes: int = 100) -> str:
    """Return the first characters of a text file, which tell its format. Raises DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(num_bytes).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "name a file that can be read") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the non-empty lines of a text file with their numbers, from 1. Raises DataError."""
    lines = read_text(path).splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: `.DS_Store`, `._photo.jpg` and `__MACOSX` of macOS, ..."""
    return name.startswith(".") or name == "__MACOSX"


def list_files(folder: Path, suffixes: Sequence[str], is_recursive: bool = False) -> list[Path]:
    """Return the files of a folder with one of the lower-case suffixes, in any case, sorted; hidden ones left out.

    With `is_recursive` those of subfolders too, also of linked ones, unless a link leads back.

    Raises:
        DataError: A folder cannot be read.
    """
    return _list_files(folder, tuple(suffixes), is_recursive, frozenset())


def _list_files(
    folder: Path, suffixes: tuple[str, ...], is_recursive: bool, ancestors: frozenset[tuple[int, int]]
) -> list[Path]:
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "name a folder that can be read") from error
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return []
    paths: list[Path] = []
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.is_file():
            paths += [folder / entry.name] if entry.name.lower().endswith(suffixes) else []
        elif is_recursive and entry.is_dir():
            paths += _list_files(folder / entry.name, suffixes, is_recursive, ancestors | {identity})
    return paths


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted; hidden ones left out. Raises DataError if it cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "name a folder that can be read") from error
    return [folder / name for name in names if not is_hidden(name) and (folder / name).is_dir()]
