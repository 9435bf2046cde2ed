"""Read the records of a run: status, summary, metrics. What is read is validated."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cvlab.errors import RunDirError
from cvlab.runs.results import is_column, is_row
from cvlab.storage.lock import is_held

STATES = ("running", "done", "failed", "interrupted", "expectations_failed")


ENDED = ("done", "expectations_failed")  # those of a run that has its result


PRUNE = "prune.txt"  # written by another program: why this run is to end before its time


Row = dict[str, Any]


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
    """Return summary.json, empty where there is none; RunDirError where its metrics or verdicts are not what they are.

    `metrics` are by name, `expect` is a list.
    """
    summary = read_json(path / "summary.json")
    wrong = invalid_field(summary)
    if wrong:
        raise RunDirError(f"{path / 'summary.json'}: {wrong} is not what it should be", "the file was changed")
    return summary


def read_status(path: Path) -> Row:
    """Return status.json; a run that says it is running but holds no lock was killed, and is `interrupted`."""
    status = read_json(path / "status.json")
    texts = [status.get(key) for key in ("experiment", "data", "error")]
    if status.get("status", STATES[0]) not in STATES or not all(isinstance(text, str | None) for text in texts):
        raise RunDirError(f"{path / 'status.json'}: not the status of a run", "the file was changed")
    if status.get("status") == "running" and not is_held(path):
        status["status"] = "interrupted"
    return status


def read_prune(path: Path) -> str | None:
    """Return why a run is to end before its time, None where nobody has asked for that."""
    try:
        return (path / PRUNE).read_text(errors="replace").strip()
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


Check = Callable[[Any], bool]


def invalid_field(summary: dict[str, Any]) -> str | None:
    """Return the key of a summary that is not what it should be; None where all are, or are not there."""
    return next((key for key, fits in CHECKS.items() if key in summary and not fits(summary[key])), None)


def _number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _all(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _block(**keys: Check) -> Check:
    """Accept a block whose `keys` fit where they are there."""
    return lambda value: isinstance(value, dict) and all(fits(value[key]) for key, fits in keys.items() if key in value)


def _with(*keys: str) -> Check:
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


def _both(*checks: Check) -> Check:
    return lambda value: all(check(value) for check in checks)


def _verdict(value: Any) -> bool:
    fits = _block(rule=_text, measured=_plain, values=_all(_plain))
    return _with("rule", "met", "measured")(value) and fits(value) and isinstance(value["met"], bool)


def _plain(value: Any) -> bool:
    return _number(value) or isinstance(value, (str, bool))


def _setting(value: Any) -> bool:
    spread = _both(_with("mean", "sd"), _block(mean=_real, sd=_number, n=_number))
    fits = _block(
        arms=_number, status=_all(lambda word: isinstance(word, str)), keys=lambda keys: isinstance(keys, dict)
    )
    if not (_with("keys", "arms", "status", "metrics")(value) and fits(value)):
        return False
    return isinstance(value["metrics"], dict) and all(map(spread, value["metrics"].values()))


def _real(value: Any) -> bool:
    return value is not None and _number(value)


CHECKS: dict[str, Check] = {
    "metrics": lambda value: isinstance(value, dict) and all(map(_plain, value.values())),
    "expect": _all(_verdict),
    "results": _all(is_row),
    "columns": _all(is_column),
    "settings": _all(_setting),
    "seconds": _number,
    "experiment": _text,
    "data": _text,
}


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return (path / "status.json").is_file() or (path / "config.yaml").is_file()
