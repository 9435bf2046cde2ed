"""Read annotation files of bounded size, with errors that name the file and the line."""

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


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the non-empty lines of a text file with their numbers, from 1. Raises DataError."""
    raw = read_bytes(path)
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{raw[: error.start].count(10) + 1}: not UTF-8 text", "save it as UTF-8") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
