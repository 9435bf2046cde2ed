"""The records of all runs below a folder, with a cache for folders of thousands.

The cache, `.runs-index.json` in that folder, is only a cache, and `.runs-configs.json` is one of the configurations,
which are four fifths of the bytes and which few queries ask for. A row is used if the files that it was read from
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

FILE, CONFIGS = ".runs-index.json", ".runs-configs.json"
FORMAT = f"cvlab {__version__} 3"
FILES = ("status.json", "summary.json", annotations.FILE, "config.yaml")
STATUS, CONFIG = 0, 3  # in FILES
MIN_ROWS_TO_WRITE = 20  # rows that were read anew; fewer are read again as fast
RACY_SECONDS = 2.0
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


CACHED = tuple(item.name for item in fields(RunRecord) if item.name != "config")  # in this order in a row
METRICS, METRIC_INFO, TAGS = map(CACHED.index, ("metrics", "metric_info", "tags"))
NUMBERS, TEXTS = (int, float, type(None)), (str, type(None))
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("run", "status", "name", "note", "error", "metric_info"), (str,)),
    **dict.fromkeys(("experiment", "data"), TEXTS),
    **dict.fromkeys(("started", "seconds", "step", "total_steps"), NUMBERS),
    "metrics": (dict,),
    "tags": (list,),
    "starred": (bool,),
}
METRIC_TYPES = frozenset({int, float, str, bool, type(None)})


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
    runs = _stamped_runs(root)
    records = _load_records(root, runs)
    if with_config:
        _load_configs(root, runs, records)
    for record in records:
        if record.status == "running" and not is_held(root / record.run):
            record.status = "interrupted"
    return records


def _stamped_runs(root: Path) -> list[tuple[str, list[Stamp]]]:
    """Return the names of the runs below a folder, sorted, each with the stamps of FILES."""
    names = sorted(entry.name for entry in os.scandir(root) if _is_folder(entry))
    runs = [(name, [_stamp(f"{root}/{name}/{file}") for file in FILES]) for name in names]
    return [(name, stamps) for name, stamps in runs if stamps[STATUS] is not None or stamps[CONFIG] is not None]


def _load_records(root: Path, runs: Sequence[tuple[str, list[Stamp]]]) -> list[RunRecord]:
    """Return the records of runs without their configurations, from the cache where they are in it."""
    cached = _read_cache(root)
    rows: dict[str, list[Any]] = {}
    records, num_read = [], 0
    for name, stamps in runs:
        row = cached.get(name)
        record = _from_row(row, stamps) if row is not None else None
        if record is None:
            num_read += 1
            now = time.time()
            record = _read(root / name)
            row = _to_row(record, stamps) if record.status != DAMAGED and _is_settled(stamps, now) else None
        if row is not None:
            rows[name] = row
        records.append(record)
    if num_read >= MIN_ROWS_TO_WRITE and len(rows) > 0:
        _write_cache(root, rows)
    return records


def _load_configs(root: Path, runs: Sequence[tuple[str, list[Stamp]]], records: Sequence[RunRecord]) -> None:
    """Set the configurations of records, from their cache where they are in it."""
    cached = _read_cache(root, CONFIGS)
    rows: dict[str, list[Any]] = {}
    num_read = 0
    for (name, stamps), record in zip(runs, records, strict=True):
        row = cached.get(name)
        record.config = _config_from_row(row, stamps[CONFIG])
        if record.config is None:
            num_read += 1
            now = time.time()
            record.config = _read_config(root / name)
            row = [stamps[CONFIG], json.dumps(record.config)] if _is_settled([stamps[CONFIG]], now) else None
        if row is not None:
            rows[name] = row
    if num_read >= MIN_ROWS_TO_WRITE and len(rows) > 0:
        _write_cache(root, rows, CONFIGS)


def _is_settled(stamps: Sequence[Stamp], now: float) -> bool:
    """Return whether files were last changed so long before `now` that another change has another time."""
    newest = max((stamp[0] for stamp in stamps if stamp is not None), default=0)
    return newest / 1e9 < now - RACY_SECONDS


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


def _read(path: Path) -> RunRecord:
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
    return record


def _read_config(path: Path) -> dict[str, Any]:
    """Return a run's configuration by dotted key, as it is in the cache; empty if it cannot be read."""
    with contextlib.suppress(CvlabError):
        config: dict[str, Any] = json.loads(json.dumps(find.read_config(path, strict_yaml.FAST_LOADER)))
        return config
    return {}


def _config_from_row(row: Any, stamp: Stamp) -> dict[str, Any] | None:
    """Return the configuration of a row of its cache; None if it is out of date or not valid."""
    try:
        config = json.loads(row[1]) if row is not None and row[0] == stamp else None
    except (TypeError, ValueError, LookupError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def start_time(name: str) -> float | None:
    """Return the POSIX time in the name of a run directory, None if it has none."""
    try:
        return datetime.strptime(name[:15], "%Y%m%d-%H%M%S").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None


def _to_row(record: RunRecord, stamps: Sequence[Stamp]) -> list[Any]:
    """Return a row of the cache. What most runs have in common is text in it, which is decoded once."""
    values = vars(record) | {"metric_info": json.dumps(record.metric_info)}
    return [stamps, [values[key] for key in CACHED]]


@functools.lru_cache(maxsize=1024)
def _shared(text: str) -> Any:
    """Decode the metrics' units and directions, which runs of an experiment share; nobody changes them."""
    value = json.loads(text)
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        raise ValueError("not the declarations of metrics")
    return value


def _from_row(row: Any, stamps: Sequence[Stamp]) -> RunRecord | None:
    """Return the record of a row of the cache; None if it is out of date, incomplete or not valid."""
    try:
        if row[0] != stamps:
            return None
        values = row[1]
        if not _has_types(tuple(map(type, values))) or not METRIC_TYPES.issuperset(map(type, values[METRICS].values())):
            return None
        if values[TAGS] and not all(isinstance(tag, str) for tag in values[TAGS]):
            return None
        record = RunRecord(*values)
        record.metric_info = _shared(values[METRIC_INFO])
    except (TypeError, ValueError, LookupError, RecursionError):
        return None
    return record


@functools.lru_cache(maxsize=1024)
def _has_types(types: tuple[type, ...]) -> bool:
    """Return whether the values of a row have the types of a record; the same few combinations come again and again."""
    return len(types) == len(CACHED) and all(kind in TYPES[name] for name, kind in zip(CACHED, types, strict=True))


def _read_cache(root: Path, file: str = FILE) -> dict[str, Any]:
    """Return the rows of a cache by run; empty if it is missing, damaged or of another version."""
    try:
        content = regular_files.read_bytes(root / file, MAX_INDEX_BYTES)
        digest, _, body = content.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return {}
        value = json.loads(body)
    except (OSError, ValueError, RecursionError):
        return {}
    is_current = isinstance(value, dict) and value.get("format") == FORMAT and isinstance(value.get("runs"), dict)
    return value["runs"] if is_current else {}


def _write_cache(root: Path, rows: dict[str, list[Any]], file: str = FILE) -> None:
    """Replace a cache; without fsync, for its checksum tells a cache that a power cut has damaged."""
    temporary = root / f"{file}-{secrets.token_hex(4)}{atomic.TEMPORARY}"
    atomic.remove_stale_temporaries(root, f"{file}-*{atomic.TEMPORARY}")
    with contextlib.suppress(OSError, ValueError):
        body = json.dumps({"format": FORMAT, "runs": rows}, separators=(",", ":")).encode()
        try:
            temporary.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            portability.replace(temporary, root / file)
        finally:
            temporary.unlink(missing_ok=True)
