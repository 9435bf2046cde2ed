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

from cvlab import console
from cvlab.errors import RunDirError
from cvlab.runs.records import STATES, Row, complete_size, is_run, read_json, to_json_value
from cvlab.storage import atomic, regular_files
from cvlab.storage.lock import RunLock


class RunDir:
    """The directory of one run.

    Args:
        path: The directory.
        on_log: Called with each line that goes into the log.
        writable: False in the ranks of a distributed run other than rank 0: they call the same methods, which then
            write nothing and take no lock.

    Attributes:
        extra_summary: What an experiment adds to summary.json beside its metrics.
    """

    def __init__(self, path: Path, on_log: Callable[[str], None] | None = None, writable: bool = True) -> None:
        self.path = path
        self.on_log = on_log
        self.writable = writable
        self.extra_summary: dict[str, Any] = {}
        self.allow_changes = False  # of data and code, when the run is resumed
        self._lock = RunLock(path)
        self._status: Row = {}
        self._metrics_descriptor: int | None = None
        self._is_logging = False

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def write(self, name: str, action: Callable[[Path], object]) -> None:
        """Call `action(path)` with the path of a file or folder of the run, if the run directory is writable.

        Everything that is written into a run directory goes through here.

        Raises:
            RunDirError: The file or folder cannot be written.
        """
        if not self.writable:
            return
        path = self.path / name
        try:
            regular_files.require_no_links(self.path, name)
            action(path)
        except OSError as error:
            raise atomic.disk_error(path, error) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator["RunDir"]:
        """Hold the run's lock; remove temporary files that a kill has left, and repair the last line of the metrics.

        Raises:
            RunDirError: Another process holds the lock.
        """
        if not self.writable:
            yield self
            return
        self._lock.acquire()
        try:
            self._remove_stale_temporaries()
            self._repair_metrics()
            self._status = read_json(self.path / "status.json")
            with console.recorded(self._record_problem):
                yield self
        finally:
            self._close_metrics()
            self._lock.release()

    def _remove_stale_temporaries(self) -> None:
        """Clean all folders but those of a sweep's trials, which have locks of their own."""
        for folder, subfolders, _ in os.walk(self.path):
            atomic.remove_stale_temporaries(Path(folder), is_locked=True)
            subfolders[:] = [name for name in subfolders if not is_run(Path(folder, name))]

    def folder(self, name: str) -> Path:
        """Return a folder below the run directory; it is created if missing."""
        self.write(name, lambda path: path.mkdir(exist_ok=True))
        return self.path / name

    def write_text(self, name: str, text: str) -> None:
        """Write a text file durably."""
        self.write(name, lambda path: atomic.write_text(path, text))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file durably, for example an image."""
        self.write(name, lambda path: atomic.write(path, lambda file: file.write(content)))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file durably; numbers that are not finite become null."""
        self.write_text(name, json.dumps(to_json_value(value), indent=2) + "\n")

    def set_status(self, state: str, **fields: Any) -> None:
        """Write status.json: one of STATES, and fields that stay there until they change."""
        assert state in STATES, state
        self._status |= {"status": state, "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"), **fields}
        self.write_json("status.json", self._status)

    def log(self, line: str) -> None:
        """Append a line to log.txt and show it."""
        if self.writable and self.on_log is not None:
            self._is_logging = True
            try:
                self.on_log(line)
            finally:
                self._is_logging = False
        self._append_to_log(line)

    def _record_problem(self, line: str) -> None:
        """Append a warning of a module that does not know the run; one that `log` shows is appended there."""
        if not self._is_logging:
            with contextlib.suppress(RunDirError):  # a full disk ends the run at its next write
                self._append_to_log(line)

    def _append_to_log(self, line: str) -> None:
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.append_text("log.txt", f"{stamp} {console.printable(line)}\n")

    def append_text(self, name: str, text: str) -> None:
        """Append to a text file."""

        def append(path: Path) -> None:
            descriptor = regular_files.open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)

        self.write(name, append)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl, in one write, so that readers see complete lines."""
        line = (json.dumps(to_json_value(row)) + "\n").encode()

        def append(path: Path) -> None:
            if self._metrics_descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._metrics_descriptor = regular_files.open_regular(path, flags)
            os.write(self._metrics_descriptor, line)

        self.write("metrics.jsonl", append)

    def sync_metrics(self) -> int:
        """Make the metrics durable and return their length in bytes, for a checkpoint to record."""
        path, descriptor = self.path / "metrics.jsonl", self._metrics_descriptor
        if descriptor is None:
            try:
                return regular_files.size_of(path)
            except OSError as error:
                raise atomic.disk_error(path, error) from error
        self.write("metrics.jsonl", lambda path: atomic.sync_file(descriptor, path))
        return os.fstat(descriptor).st_size

    def truncate_metrics(self, length: int) -> None:
        """Cut the metrics back to the length that a checkpoint recorded, so that a resume leaves no duplicates.

        Raises:
            RunDirError: They are shorter than that.
        """

        def truncate(path: Path) -> None:
            size = regular_files.size_of(path)
            if size < length:
                raise RunDirError(f"{path}: {size} bytes, but the checkpoint knows of {length}", "the file was changed")
            if size > length:
                self._truncate(path, length)

        self.write("metrics.jsonl", truncate)

    def _repair_metrics(self) -> None:
        """Remove a last line that is not complete."""

        def repair(path: Path) -> None:
            size = regular_files.size_of(path)
            complete = complete_size(path) if size else 0
            if complete < size:
                self._truncate(path, complete)

        self.write("metrics.jsonl", repair)

    def _truncate(self, path: Path, length: int) -> None:
        """Cut the metrics; they are written anew where the file system cannot cut a file."""
        try:
            descriptor = regular_files.open_regular(path, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, length)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in atomic.UNSUPPORTED:
                raise
            content = path.read_bytes()[:length]
            self._close_metrics()  # of the file that is replaced
            atomic.write(path, lambda file: file.write(content))

    def __del__(self) -> None:
        self._close_metrics()  # of a run directory that is used without its lock

    def _close_metrics(self) -> None:
        descriptor: int | None = getattr(self, "_metrics_descriptor", None)  # missing if __init__ failed
        if descriptor is not None:
            os.close(descriptor)
            self._metrics_descriptor = None
