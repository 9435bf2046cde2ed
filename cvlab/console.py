"""What people see while a run goes on: lines, and a progress bar on a terminal. All of it goes to stderr."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from cvlab.errors import RunDirError

QUIET, NORMAL, VERBOSE = 0, 1, 2
PLAIN_EVERY_SECONDS = 5.0
level = NORMAL


def set_level(quiet: bool, verbose: bool) -> None:
    """Choose how much is shown: warnings and errors only, the usual, or more."""
    global level  # noqa: PLW0603 - one terminal, one level
    level = QUIET if quiet else VERBOSE if verbose else NORMAL


def info(line: str) -> None:
    """Show a line, unless quiet was asked for; warnings are shown always."""
    if level > QUIET or line.startswith(("warning:", "error:")):
        print(line, file=sys.stderr, flush=True)


def debug(line: str) -> None:
    """Show a line only where more was asked for."""
    if level >= VERBOSE:
        info(line)


def format_seconds(seconds: float) -> str:
    """Format a duration as `m:ss` or `h:mm:ss`."""
    whole = int(max(0, seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with its unit: `170.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class Stream:
    """Standard output or error that outlives its reader: what is written after a pipe or terminal closed is dropped."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or drop."""
        with self._dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        with self._dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Send the rest nowhere once a write has failed; RunDirError, once, where the disk behind `>` is full."""
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal has gone
                raise RunDirError(f"{self.stream.name}: {error.strerror}", "free space") from error


def ignore_broken_pipe() -> None:
    """Let `cvlab ... | head` end as it would without the pipe, with the same exit code."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere, nothing where quiet was asked for."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.first = label, total, done
        self.start = self.shown = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> "Progress":
        if level > QUIET and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=5,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=self.total, completed=self.first, text="")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def due(self) -> bool:
        """Whether it is time to show something new; building the text costs something."""
        return level > QUIET and time.monotonic() - self.shown >= (0.2 if self.bar is not None else PLAIN_EVERY_SECONDS)

    def update(self, done: int, text: str) -> None:
        """Show that `done` of the total is done."""
        self.shown = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, total=self.total, completed=done, text=text)
        elif level > QUIET:
            rate = (done - self.first) / max(self.shown - self.start, 1e-9)
            left = f"  {format_seconds((self.total - done) / rate)} left" if rate > 0 else ""
            info(f"{self.label} {done}/{self.total}  {text}{left}")
