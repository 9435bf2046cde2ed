"""The run directory: the only place a run writes to, and the only thing a comparison reads.

runs/20261123-221500-cifar_bn-3f2a/
    config.yaml  env.json  status.json  metrics.jsonl  summary.json  log.txt  checkpoints/  images/  plots/
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.errors import RunDirError
from cvlab.runs import summaries
from cvlab.storage import atomic
from cvlab.storage.lock import RunLock, is_held

STATES = ("running", "done", "failed", "interrupted", "unmet")
ENDED = ("done", "unmet")  # those of a run that has its result
PRUNE = "prune.txt"  # written by another program: why this run is to end before its time
Row = dict[str, Any]


def runs_root(chosen: str | None = None) -> Path:
    """Return the folder of all runs: the one chosen, else $CVLAB_RUNS, else ./runs."""
    return Path(chosen or os.environ.get("CVLAB_RUNS") or "runs")


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
            atomic.sweep(Path(folder))
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
            whole = _whole_lines(path)
            if whole < path.stat().st_size:
                os.truncate(path, whole)


def _whole_lines(path: Path, chunk: int = 65536) -> int:
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


def create(root: Path, name: str, echo: Callable[[str], None] | None = None) -> RunDir:
    """Make a new run directory below `root` and point `latest` to it. RunDirError if the disk refuses."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for _ in range(20):
            stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
            path = root / f"{stamp}-{name}-{secrets.token_hex(2)}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            _point_latest(root, path)
            return RunDir(path, echo)
    except OSError as error:
        raise atomic.disk_error(root, error) from error
    raise RunDirError(f"{root}: no free name for a run", "try again")


def _point_latest(root: Path, path: Path) -> None:
    temporary = root / f".latest-{path.name}"
    with contextlib.suppress(OSError):  # a file system without links loses only the shortcut
        temporary.symlink_to(path.name)
        os.replace(temporary, root / "latest")


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return (path / "status.json").is_file() or (path / "config.yaml").is_file()


def config_file(path: Path) -> Path:
    """Return a run's config.yaml; RunDirError where there is none."""
    file = path / "config.yaml"
    if not file.is_file():
        raise RunDirError(f"{path}: has no config.yaml", "it stopped before it had begun; start it again")
    return file


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than the disk allows
        return False


def list_runs(root: Path) -> list[Path]:
    """Return all run directories below `root`, oldest first; RunDirError where `root` is not a folder."""
    if not root.is_dir():
        if root.exists():
            raise RunDirError(f"{root}: not a folder", "name one with --runs-dir")
        return []
    return sorted(path for path in root.iterdir() if not path.is_symlink() and path.is_dir() and is_run(path))


def find(reference: str, root: Path) -> Path:
    """Return the run that is meant by a path, `latest`, a full name, or a part of the name that only one run has."""
    if not reference.strip():
        raise RunDirError("no run is named", "give a run directory, `latest`, or part of a run's name")
    for path in (Path(reference), root / reference):
        if _is_folder(path) and is_run(path):
            return path.resolve()
    runs = list_runs(root)
    if reference == "latest" and runs:
        return runs[-1].resolve()  # the link is gone, or the run that it named
    matches = [path for path in runs if reference in path.name]
    if len(matches) == 1:
        return matches[0].resolve()
    if matches:
        raise RunDirError(f"{reference!r} fits {len(matches)} runs", f"for example {matches[-1].name}")
    close = registry.nearest(reference, [path.name for path in runs])
    hint = f"did you mean {close!r}?" if close else f"`cvlab runs` lists those below {root}"
    raise RunDirError(f"no run {reference!r}", hint)


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
    wrong = summaries.wrong(summary)
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
