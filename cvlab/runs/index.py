"""The records of all runs below a folder, with a cache for folders of thousands.

The cache, `.runs-index.json` in that folder, is only a cache. A row of it is used if the files that it was read from
have the same modification time, size and inode, and were not written within RACY_SECONDS before they were read, within
which a second change could have the same time. A cache that is missing, damaged, of another version or not writable
costs time and nothing else; of several writers the last one wins. Whether a run is still running is never cached.
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cvlab import __version__, portability
from cvlab.config import strict_yaml
from cvlab.errors import CvlabError
from cvlab.runs import annotations, find
from cvlab.runs.records import read_recorded_status, read_summary
from cvlab.storage import atomic, regular_files
from cvlab.storage.lock import is_held

FILE = ".runs-index.json"
FORMAT = f"cvlab {__version__} 2"
FILES = ("status.json", "summary.json", annotations.FILE, "config.yaml")
MIN_ROWS_TO_WRITE = 20  # rows that were read anew; fewer are read again as fast
RACY_SECONDS = 2.0
LEFTOVER_SECONDS = 600.0
MAX_INDEX_BYTES = 512 * 2**20
DAMAGED, NOT_BEGUN = "damaged", "not begun"  # besides the states of status.json

Stamp = list[int] | None


@dataclass
class RunRecord:
    """What the list of runs knows about a run.

    Attributes:
        run: Name of its directory.
        status: One of `records.STATES`, `damaged` or `not begun`.
        started: POSIX time, from the directory's name; None if it has none.
        error: Why a record is damaged.
        config: The configuration by dotted key; None if it was not read or cannot be.
    """

    run: str
    status: str = NOT_BEGUN
    name: str = ""
    experiment: str | None = None
    data: str | None = None
    started: float | None = None
    seconds: float | None = None
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    metric_info: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    note: str = ""
    starred: bool = False
    error: str = ""
    config: dict[str, Any] | None = None


NAMES = tuple(item.name for item in fields(RunRecord))
TEXTS, NUMBERS = ("run", "status", "name", "note", "error"), ("started", "seconds", "step", "total_steps")


def load(root: Path, with_config: bool = False) -> list[RunRecord]:
    """Return the records of all runs below a folder, oldest first.

    Args:
        root: The folder of the runs.
        with_config: Also read the configurations.

    Raises:
        RunDirError: `root` is not a folder.
    """
    if not root.is_dir():
        find.list_runs(root)  # raises the error if there is one
        return []
    cached = _read_cache(root)
    rows: dict[str, list[Any]] = {}
    records, num_read = [], 0
    for name in sorted(entry.name for entry in os.scandir(root) if _is_folder(entry)):
        stamps = [_stamp(f"{root}/{name}/{file}") for file in FILES]
        if stamps[0] is None and stamps[-1] is None:
            continue
        row = cached.get(name)
        record = _from_row(row, stamps, with_config) if row is not None else None
        if record is None or row is None:
            num_read += 1
            now = time.time()
            record = _read(root / name, with_config)
            newest = max(stamp[0] for stamp in stamps if stamp is not None) / 1e9
            is_settled = record.status != DAMAGED and newest < now - RACY_SECONDS
            row = _to_row(record, stamps) if is_settled else None
        if row is not None:
            rows[name] = row
        if record.status == "running" and not is_held(root / name):
            record.status = "interrupted"
        records.append(record)
    if num_read >= MIN_ROWS_TO_WRITE and len(rows) > 0:
        _write_cache(root, rows)
    return records


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _stamp(path: str) -> Stamp:
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return [status.st_mtime_ns, status.st_size, status.st_ino]


def _read(path: Path, with_config: bool) -> RunRecord:
    """Read a run's files. A run that is said to be running stays so: its lock is asked each time."""
    record = RunRecord(path.name, started=start_time(path.name))
    try:
        summary, status, notes = read_summary(path), read_recorded_status(path), annotations.read(path)
    except CvlabError as error:
        record.status, record.error = DAMAGED, error.message
        return record
    record.status = status.get("status", NOT_BEGUN)
    name = summary.get("name")
    record.name = name if isinstance(name, str) else find.configured_name(path.name)
    record.experiment, record.data = status.get("experiment"), status.get("data")
    record.seconds = summary.get("seconds")
    record.step, record.total_steps = (
        value if isinstance(value := status.get(key), int) else None for key in ("step", "total_steps")
    )
    record.metrics, record.metric_info = summary.get("metrics", {}), summary.get("metric_info", {})
    record.tags, record.note, record.starred = list(notes.tags), notes.note, notes.starred
    if with_config:
        with contextlib.suppress(CvlabError):
            config = find.read_config(path, strict_yaml.FAST_LOADER)
            record.config = json.loads(json.dumps(config))  # tuples become lists, as in the cache
        record.config = record.config or {}
    return record


def start_time(name: str) -> float | None:
    """Return the POSIX time in the name of a run directory, None if it has none."""
    try:
        return datetime.strptime(name[:15], "%Y%m%d-%H%M%S").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None


def _to_row(record: RunRecord, stamps: Sequence[Stamp]) -> list[Any]:
    """Return a row of the cache. What few need, and what most runs have in common, is text in it, decoded on demand."""
    values = vars(record) | {
        "metric_info": json.dumps(record.metric_info),
        "config": None if record.config is None else json.dumps(record.config),
    }
    return [stamps, [values[key] for key in NAMES]]


@functools.lru_cache(maxsize=1024)
def _shared(text: str) -> Any:
    """Decode the metrics' units and directions, which runs of an experiment share; nobody changes them."""
    return json.loads(text)


def _from_row(row: Any, stamps: Sequence[Stamp], with_config: bool) -> RunRecord | None:
    """Return the record of a row of the cache; None if it is out of date, incomplete or not valid."""
    try:
        if row[0] != stamps:
            return None
        values = dict(zip(NAMES, row[1], strict=True))
        if with_config and values["config"] is None:
            return None
        values["config"] = json.loads(values["config"]) if with_config else None
        values["metric_info"] = _shared(values["metric_info"])
        record = RunRecord(**values)
    except (TypeError, ValueError, LookupError, RecursionError):
        return None
    return record if _is_valid(record) else None


def _is_valid(record: RunRecord) -> bool:
    values = vars(record)
    return (
        all(isinstance(values[key], str) for key in TEXTS)
        and all(values[key] is None or isinstance(values[key], str) for key in ("experiment", "data"))
        and all(values[key] is None or isinstance(values[key], (int, float)) for key in NUMBERS)
        and isinstance(record.metrics, dict)
        and all(value is None or isinstance(value, (int, float, str)) for value in record.metrics.values())
        and isinstance(record.metric_info, dict)
        and all(isinstance(value, dict) for value in record.metric_info.values())
        and isinstance(record.tags, list)
        and all(isinstance(tag, str) for tag in record.tags)
        and isinstance(record.starred, bool)
        and (record.config is None or isinstance(record.config, dict))
    )


def _read_cache(root: Path) -> dict[str, Any]:
    """Return the rows of the cache by run; empty if it is missing, damaged or of another version."""
    try:
        content = regular_files.read_bytes(root / FILE, MAX_INDEX_BYTES)
        digest, _, body = content.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return {}
        value = json.loads(body)
    except (OSError, ValueError, RecursionError):
        return {}
    is_current = isinstance(value, dict) and value.get("format") == FORMAT and isinstance(value.get("runs"), dict)
    return value["runs"] if is_current else {}


def _write_cache(root: Path, rows: dict[str, list[Any]]) -> None:
    """Replace the cache; without fsync, for its checksum tells a cache that a power cut has damaged."""
    temporary = root / f"{FILE}-{secrets.token_hex(4)}{atomic.TEMPORARY}"
    with contextlib.suppress(OSError, ValueError):
        for leftover in root.glob(f"{FILE}-*{atomic.TEMPORARY}"):
            if time.time() - leftover.lstat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()
        body = json.dumps({"format": FORMAT, "runs": rows}, separators=(",", ":")).encode()
        try:
            temporary.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            portability.replace(temporary, root / FILE)
        finally:
            temporary.unlink(missing_ok=True)
