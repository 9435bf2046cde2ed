"""Read and validate the records of a run: status, summary, metrics."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from cvlab.errors import RunDirError
from cvlab.storage import atomic, regular_files
from cvlab.storage.lock import is_held

STATES = ("running", "done", "failed", "interrupted", "expectations_failed")
ENDED = ("done", "expectations_failed")  # those of a run that has its result
MAX_JSON_BYTES, MAX_METRICS_BYTES, MAX_LINE_BYTES = 32 * 2**20, 256 * 2**20, 2**20  # of what is read
PRUNE_FILE = "prune.txt"  # in a run directory: why the run is to end early

Row = dict[str, Any]


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value of a record is an int or a float, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def complete_size(path: Path, chunk: int = 65536) -> int:
    """Return the number of bytes up to and including the last newline, reading from the end."""
    with regular_files.open_binary(path, MAX_METRICS_BYTES) as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - chunk)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def to_json_value(value: Any) -> Any:
    """Convert a value for JSON: tuples become lists, paths strings, numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> Row:
    """Read one of a run's JSON files; empty if missing, RunDirError if damaged."""
    try:
        value = json.loads(regular_files.read_bytes(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirError(f"{path}: cannot be read: {error}", "the file was changed or the disk is damaged") from error
    if not isinstance(value, dict):
        raise RunDirError(f"{path}: not a JSON object", "the file was changed")
    return value


def read_summary(path: Path) -> Row:
    """Return summary.json, empty if missing.

    Raises:
        RunDirError: The file is damaged or does not fit `schemas.Summary`.
    """
    summary = read_json(path / "summary.json")
    invalid = _invalid_key("Summary", summary)
    if invalid is not None:
        raise RunDirError(f"{path / 'summary.json'}: {invalid} has the wrong type or value", "the file was changed")
    return summary


def read_status(path: Path) -> Row:
    """Return status.json, empty if missing; a run that is said to be running but holds no lock is `interrupted`.

    Raises:
        RunDirError: The file is damaged or does not fit `schemas.Status`.
    """
    status = read_recorded_status(path)
    if status.get("status") == "running" and not is_held(path):
        status["status"] = "interrupted"
    return status


def read_continued(path: Path) -> tuple[str, int] | None:
    """Return the name of the run that a run continues and the step at which it does; None if it began at step 0."""
    record = read_json(path / "env.json").get("continues")
    if not isinstance(record, dict):
        return None
    name, step = record.get("run"), record.get("step")
    return (name, step) if isinstance(name, str) and isinstance(step, int) else None


def read_recorded_status(path: Path) -> Row:
    """Return status.json as `read_status` does, but `running` as it was written."""
    status = read_json(path / "status.json")
    if _invalid_key("Status", status) is not None or status.get("status", STATES[0]) not in STATES:
        raise RunDirError(f"{path / 'status.json'}: not the status of a run", "the file was changed")
    return status


def _invalid_key(schema: str, record: Row) -> str | None:
    """Return the key of a record that does not fit one of runs.schemas, None if all do."""
    from cvlab.runs import schemas  # pydantic is too slow to import for `cvlab --help`

    return schemas.invalid_key(getattr(schemas, schema), record)


def request_pruning(path: Path, reason: str) -> None:
    """Ask a run to stop after its next evaluation, because a search has no use for its result."""
    atomic.write_text(path / PRUNE_FILE, reason + "\n")


def pruning_reason(path: Path) -> str | None:
    """Return why a run is to end early, None if nobody has asked for that."""
    try:
        return regular_files.read_bytes(path / PRUNE_FILE, MAX_LINE_BYTES).decode(errors="replace").strip()
    except OSError:
        return None


def read_metrics(path: Path) -> Iterator[Row]:
    """Yield the rows of metrics.jsonl; lines that are incomplete, too long or not valid are skipped.

    Raises:
        RunDirError: The file is a link, not a regular file, or too large.
    """
    return (row for row, _ in read_metrics_from(path, 0))


def read_metrics_from(path: Path, start: int) -> Iterator[tuple[Row, int]]:
    """Yield the rows of metrics.jsonl from a number of bytes on, each with the number of bytes up to its end.

    A file that is shorter by now, since a run was resumed, is read from its beginning. Raises as `read_metrics`.
    """
    file_path = path / "metrics.jsonl"
    try:
        file = regular_files.open_binary(file_path, MAX_METRICS_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"{file_path}: cannot be read: {error}", "the file was changed") from error
    is_continued = False  # the rest of a line that is too long is no line
    with file:
        file.seek(start if start <= file.seek(0, os.SEEK_END) else 0)
        while line := file.readline(MAX_LINE_BYTES):
            is_whole = line.endswith(b"\n") and not is_continued
            is_continued = not line.endswith(b"\n")
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line) if is_whole else None
                if isinstance(row, dict):
                    yield row, file.tell()


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory."""
    try:
        return (path / "status.json").is_file() or (path / "config.yaml").is_file()
    except OSError:  # a folder that cannot be searched, or a name that is too long
        return False


def is_trial(path: Path) -> bool:
    """Return whether a run is a trial of a sweep."""
    return path.parent.name == "trials" and is_run(path.parent.parent)


def require_folder(path: Path) -> Path:
    """Return a folder of a run directory; RunDirError if it is a link, which would lead outside."""
    if path.is_symlink():
        raise RunDirError(f"{path}: it is a link", "the run directory was changed")
    return path
