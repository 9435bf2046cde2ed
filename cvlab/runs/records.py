"""Read the records of a run: status, summary, metrics. What is read is validated."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from pydantic import BaseModel, ConfigDict, InstanceOf, ValidationError

from cvlab.errors import RunDirError
from cvlab.storage import atomic
from cvlab.storage.lock import is_held

State = Literal["running", "done", "failed", "interrupted", "expectations_failed"]
STATES: tuple[State, ...] = ("running", "done", "failed", "interrupted", "expectations_failed")
ENDED = ("done", "expectations_failed")  # those of a run that has its result
PRUNE_FILE = "prune.txt"  # in a run directory: why the run is to end early

Row = dict[str, Any]
Real = InstanceOf[float] | Annotated[int, Gt(-(2**63)), Lt(2**63)]  # JSON has integers of any length
Number = Real | None  # null: it was not finite
Value = Number | str | bool


class _Record(BaseModel):
    """A part of a JSON file: what is read from it is validated, further keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class ResultRow(_Record):
    """The result of one image; further values are the experiment's own."""

    image: str
    error: str = ""


class ColumnRecord(_Record, extra="forbid"):
    """A column of the results, see `runs.results.Column`."""

    name: str
    title: str
    unit: str = ""
    keys: list[str] = []
    is_file: bool = False
    is_detail: bool = False
    has_lines: bool = False


class Verdict(_Record):
    """An expectation and whether it was met."""

    rule: str | None
    met: bool
    measured: Value
    values: list[Value] = []


class MetricRecord(_Record):
    """What a run declares about one of its metrics."""

    unit: str = ""
    better: Literal["higher", "lower"] | None = None


class Spread(_Record):
    """A metric over the seeds of a setting."""

    mean: Real
    sd: Number
    n: Number = None


class Setting(_Record):
    """The arms of a sweep that differ only in their seed."""

    keys: Row
    arms: Number
    status: list[str]
    metrics: dict[str, Spread]


class Summary(_Record):
    """summary.json."""

    experiment: str | None = None
    data: str | None = None
    seconds: Number = None
    metrics: dict[str, Value] = {}
    metric_info: dict[str, MetricRecord] = {}
    expect: list[Verdict] = []
    results: list[ResultRow] = []
    columns: list[ColumnRecord] = []
    settings: list[Setting] = []


class Status(_Record):
    """status.json."""

    status: State = "running"
    experiment: str | None = None
    data: str | None = None
    error: str | None = None


def whole_lines(path: Path, chunk: int = 65536) -> int:
    """Return the number of bytes up to and with the last newline, reading from the end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - chunk)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def plain(value: Any) -> Any:
    """Make a value fit for JSON: tuples become lists, numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> Row:
    """Read one of a run's JSON files; empty where there is none, RunDirError where it is damaged."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirError(f"{path}: cannot be read: {error}", "the file was changed or the disk is damaged") from error
    if not isinstance(value, dict):
        raise RunDirError(f"{path}: not a JSON object", "the file was changed")
    return value


def read_summary(path: Path) -> Row:
    """Return summary.json, empty if missing.

    Raises:
        RunDirError: The file is damaged or does not fit `Summary`.
    """
    summary = read_json(path / "summary.json")
    invalid = _invalid_key(Summary, summary)
    if invalid is not None:
        raise RunDirError(f"{path / 'summary.json'}: {invalid} is not what it should be", "the file was changed")
    return summary


def read_status(path: Path) -> Row:
    """Return status.json, empty if missing; a run that is said to be running but holds no lock is `interrupted`.

    Raises:
        RunDirError: The file is damaged or does not fit `Status`.
    """
    status = read_json(path / "status.json")
    if _invalid_key(Status, status) is not None:
        raise RunDirError(f"{path / 'status.json'}: not the status of a run", "the file was changed")
    if status.get("status") == "running" and not is_held(path):
        status["status"] = "interrupted"
    return status


def _invalid_key(kind: type[_Record], value: Row) -> str | None:
    """Return the key of a record that does not fit, None if all do."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
    return None


def request_pruning(path: Path, reason: str) -> None:
    """Ask a run to stop after its next evaluation, because a search has no use for its result."""
    atomic.write_text(path / PRUNE_FILE, reason + "\n")


def pruning_reason(path: Path) -> str | None:
    """Return why a run is to end early, None if nobody has asked for that."""
    try:
        return (path / PRUNE_FILE).read_text(errors="replace").strip()
    except OSError:
        return None


def read_metrics(path: Path) -> Iterator[Row]:
    """Yield the rows of metrics.jsonl; a torn last line is left out."""
    file_path = path / "metrics.jsonl"
    if not file_path.exists():
        return
    with file_path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return (path / "status.json").is_file() or (path / "config.yaml").is_file()
