"""The run directory: the only place a run writes to, and the only thing a comparison reads.

runs/20261123-221500-cifar_bn-3f2a/
    config.yaml  env.json  status.json  metrics.jsonl  summary.json  log.txt  checkpoints/  images/  plots/
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cvlab.errors import RunDirError
from cvlab.runs.records import STATES, Row, is_run, plain, read_json, whole_lines
from cvlab.storage import atomic
from cvlab.storage.lock import RunLock


class RunDir:
    """One run's directory. `echo` is shown what goes into the log."""

    def __init__(self, path: Path, echo: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.echo = echo
        self.facts: dict[str, Any] = {}  # what an experiment wants in summary.json beside its metrics
        self._lock = RunLock(path)
        self._status: Row = {}
        self._metrics_descriptor: int | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @contextlib.contextmanager
    def locked(self) -> Iterator["RunDir"]:
        """Hold the run's lock; sweep what a kill has left, and repair a torn last line of the metrics."""
        self._lock.acquire()
        try:
            self._sweep()
            self._repair_metrics()
            self._status = read_json(self.path / "status.json")
            yield self
        finally:
            if self._metrics_descriptor is not None:
                os.close(self._metrics_descriptor)
                self._metrics_descriptor = None
            self._lock.release()

    def _sweep(self) -> None:
        """Remove the temporary files of a kill from all folders but those of arms, which have locks of their own."""
        for folder, below, _ in os.walk(self.path):
            atomic.remove_stale_temporaries(Path(folder))
            below[:] = [name for name in below if not is_run(Path(folder, name))]

    def folder(self, name: str) -> Path:
        """Return a folder below the run directory, made if it is not there."""
        made = self.path / name
        try:
            made.mkdir(exist_ok=True)
        except OSError as error:
            raise atomic.disk_error(made, error) from error
        return made

    def write_text(self, name: str, text: str) -> None:
        """Write a text file durably."""
        atomic.write_text(self.path / name, text)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file durably, for example a picture."""
        atomic.write(self.path / name, lambda file: file.write(content))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file durably; numbers that are not finite become null."""
        self.write_text(name, json.dumps(plain(value), indent=2) + "\n")

    def set_status(self, state: str, **more: Any) -> None:
        """Write status.json: one of STATES and what else is known, which stays there until it changes."""
        assert state in STATES, state
        self._status |= {"status": state, "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"), **more}
        self.write_json("status.json", self._status)

    def log(self, line: str) -> None:
        """Append a line to log.txt and show it."""
        if self.echo is not None:
            self.echo(line)
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            with (self.path / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{stamp} {line}\n")
        except OSError as error:
            raise atomic.disk_error(self.path / "log.txt", error) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl, in one write, so that readers see whole lines."""
        path = self.path / "metrics.jsonl"
        try:
            if self._metrics_descriptor is None:
                self._metrics_descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(self._metrics_descriptor, (json.dumps(plain(row)) + "\n").encode())
        except OSError as error:
            raise atomic.disk_error(path, error) from error

    def sync_metrics(self) -> int:
        """Make the metrics durable and return their length in bytes: a checkpoint records it."""
        if self._metrics_descriptor is None:
            path = self.path / "metrics.jsonl"
            return path.stat().st_size if path.exists() else 0
        try:
            os.fsync(self._metrics_descriptor)
            return os.fstat(self._metrics_descriptor).st_size
        except OSError as error:
            raise atomic.disk_error(self.path / "metrics.jsonl", error) from error

    def truncate_metrics(self, length: int) -> None:
        """Cut the metrics back to what a checkpoint knew of, so that a resume leaves no gap and no duplicate."""
        path = self.path / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise RunDirError(f"{path}: {size} bytes, but the checkpoint knows of {length}", "the file was changed")
        if size > length:
            os.truncate(path, length)

    def _repair_metrics(self) -> None:
        path = self.path / "metrics.jsonl"
        if path.exists():
            whole = whole_lines(path)
            if whole < path.stat().st_size:
                os.truncate(path, whole)
