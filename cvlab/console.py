"""Messages and the progress bar, all on stderr; and how text from files is made fit for a terminal."""

import contextlib
import html
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from cvlab import portability
from cvlab.errors import RunDirError

QUIET, NORMAL, VERBOSE = 0, 1, 2
PLAIN_EVERY_SECONDS = 5.0
UNPRINTABLE = re.compile(  # control characters, line separators, marks that reorder text, parts of surrogate pairs
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
level = NORMAL
_on_problem: Callable[[str], None] | None = None
_stdout: Any = None  # where documents go while `only_documents_on_stdout`


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def printable(text: str) -> str:
    """Return text as one line in which nothing is an instruction to a terminal: control characters are escaped."""
    return UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """Return text of several lines, each made `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def set_level(quiet: bool, verbose: bool) -> None:
    """Set how much is shown: warnings and errors only, the default, or more."""
    global level  # noqa: PLW0603 - one terminal, one level
    level = QUIET if quiet else VERBOSE if verbose else NORMAL


@contextlib.contextmanager
def shown(is_shown: bool) -> Iterator[None]:
    """Show the default amount, or warnings and errors only, and go back to the level of before."""
    before = level
    set_level(quiet=not is_shown, verbose=False)
    try:
        yield
    finally:
        set_level(quiet=before == QUIET, verbose=before == VERBOSE)


def notebook_display() -> Any:
    """Return IPython's module `display` in a notebook, None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return sys.modules.get("IPython.display") if getattr(shell, "kernel", None) is not None else None


def info(line: str) -> None:
    """Show a line unless the level is quiet; warnings and errors are always shown."""
    is_problem = line.startswith(("warning:", "error:"))
    if is_problem and _on_problem is not None:
        _on_problem(line)
    if level > QUIET or is_problem:
        # a notebook shows what is on stderr on red ground
        stream = sys.stderr if is_problem or notebook_display() is None else sys.stdout
        print(printable(line), file=stream, flush=True)


@contextlib.contextmanager
def recorded(on_problem: Callable[[str], None]) -> Iterator[None]:
    """Call a function with each warning and error that is shown, such as those of the data that a run loads."""
    global _on_problem  # noqa: PLW0603 - one console
    before, _on_problem = _on_problem, on_problem
    try:
        yield
    finally:
        _on_problem = before


@contextlib.contextmanager
def only_documents_on_stdout() -> Iterator[None]:
    """Send what is printed to stderr, also by the user's own code, except for what `document` prints."""
    global _stdout  # noqa: PLW0603 - one standard output
    _stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


def document(text: str) -> None:
    """Print a document on stdout."""
    print(text, file=_stdout or sys.stdout, flush=True)


def show(text: str, end: str = "\n") -> None:
    """Print text for people on stdout, whose lines are made printable."""
    print(printable_lines(text), end=end)


def always(line: str) -> None:
    """Show a line at every level."""
    print(printable(line), file=sys.stderr, flush=True)


def show_traceback(error: BaseException) -> None:
    """Show the traceback of an error."""
    print(printable_lines("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)


def debug(line: str) -> None:
    """Show a line if the level is verbose."""
    if level >= VERBOSE:
        info(line)


def relative_path(path: Path) -> str:
    """Return a path as it can be pasted into a command: relative if it lies in the current folder."""
    with contextlib.suppress(OSError, ValueError):
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    return str(path)


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
    """Standard output or error that drops what is written after its pipe or terminal was closed."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        with self._dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop the rest."""
        with self._dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Redirect to /dev/null once a write has failed; RunDirError, once, if the disk is full."""
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            if error.errno not in portability.CLOSED_STREAM:
                raise RunDirError(f"{self.stream.name}: {error.strerror}", "free space") from error


def ignore_broken_pipe() -> None:
    """Let `cvlab ... | head` end as without the pipe, with the same exit code."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)


class Progress:
    """A progress bar on a terminal or in a notebook, a line every few seconds elsewhere, nothing if the level is quiet.

    Args:
        label: What is in progress.
        total: Number of steps, None if unknown.
        done: Number of steps done at the start.
    """

    def __init__(self, label: str, total: int | None, done: int = 0) -> None:
        self.label, self.total, self.first = printable(label), total, done
        self.start = self.shown = time.monotonic()
        self.last: tuple[float, str] | None = None
        self.bar: Any = None
        self.task: Any = None
        self.cell: Any = None  # the handle of a notebook's output

    def __enter__(self) -> "Progress":
        display = notebook_display()
        if level > QUIET and display is not None:
            self.cell = display.display(display.HTML(self._html(self.first, "")), display_id=True)
        elif level > QUIET and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
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
        if self.cell is not None and error is None:
            self._update_cell(self.total or (self.last or (self.first, ""))[0], format_seconds(self._seconds()))

    def due(self) -> bool:
        """Return whether an update is due, so that its text need not be built each time."""
        return level > QUIET and time.monotonic() - self.shown >= self._interval()

    def _interval(self) -> float:
        if self.bar is not None:
            return 0.2
        return 0.5 if self.cell is not None else PLAIN_EVERY_SECONDS

    def _seconds(self) -> float:
        return time.monotonic() - self.start

    def _html(self, done: float, text: str) -> str:
        value = f' value="{done:g}" max="{max(self.total, 1)}"' if self.total is not None else ""
        count = f"{int(done)}/{self.total}" if self.total is not None else f"{int(done)}"
        label = html.escape(f"{self.label} {count}  {text}")
        return f'<div style="font-family:monospace;white-space:pre-wrap"><progress{value}></progress> {label}</div>'

    def _update_cell(self, done: float, text: str) -> None:
        display = sys.modules["IPython.display"]
        self.cell.update(display.HTML(self._html(done, text)))

    def update(self, done: float, text: str) -> None:
        """Show that `done` steps are done, and a text."""
        self.shown, text = time.monotonic(), printable(text)
        if self.bar is not None:
            self.bar.update(self.task, total=self.total, completed=done, text=text)
        elif level > QUIET and (done, text) != self.last:
            self.last = (done, text)
            rate = (done - self.first) / max(self._seconds(), 1e-9)
            left = f"  {format_seconds((self.total - done) / rate)} left" if self.total is not None and rate > 0 else ""
            if self.cell is not None:
                self._update_cell(done, f"{text}{left}")
                return
            of_total = f"/{self.total}" if self.total is not None else ""
            info(f"{self.label} {int(done)}{of_total}  {text}{left}")
