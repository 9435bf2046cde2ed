"""Command lines run beside each other on this machine.

A sweep needs one function of an engine: it takes tasks, runs `cvlab` with the arguments of each, at most so many at a
time, and yields (index, exit code) as they end. What a task does it leaves in its run directory, so that any engine
fits that shares the disk.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, NamedTuple

from cvlab.signals import StopRequest

POLL_SECONDS = 0.2
PRELOADED = (  # seconds of every arm
    "cvlab.cli",
    "cvlab.runner",
    "cvlab.experiments.classify",
    "cvlab.report.plots",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._dynamo",
)


class Task(NamedTuple):
    """The arguments of one `cvlab` command line, and the file that takes what it says on standard error."""

    arguments: tuple[str, ...]
    errors: Path


def local(tasks: Sequence[Task], workers: int, stop: StopRequest) -> Iterator[tuple[int, int]]:
    """Run each task in a process of its own, forked from one that has torch loaded; at most `workers` at a time.

    When `stop` has received a signal no further task starts, and those that run are asked to save and end.
    """
    start_server()
    context = multiprocessing.get_context("forkserver")
    waiting = list(enumerate(tasks))
    running: dict[Any, tuple[int, Any]] = {}
    asked = False
    try:
        while waiting or running:
            while waiting and len(running) < workers and stop.received is None:
                index, task = waiting.pop(0)
                process = context.Process(target=_run, args=(task, dict(os.environ), str(Path.cwd())))
                process.start()
                running[process.sentinel] = (index, process)
            if stop.received is not None and not asked:
                waiting, asked = [], True
                _terminate(running)
            for sentinel in connection.wait(list(running), timeout=POLL_SECONDS):
                index, process = running.pop(sentinel)
                process.join()
                yield index, process.exitcode
    finally:
        _terminate(running)
        for _, process in running.values():
            process.join()


def start_server() -> None:
    """Start the process that forks the tasks, unless it runs; it loads torch while this one does other things.

    A signal to all of us must not end it before them; they are asked to stop one by one.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    before = {number: signal.signal(number, signal.SIG_IGN) for number in StopRequest.SIGNALS}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(running: Mapping[Any, tuple[int, Any]]) -> None:
    for _, process in running.values():
        process.terminate()


def errors_of(task: Task) -> str:
    """Return the last line that a task said on standard error, and remove the file."""
    try:
        lines = task.errors.read_text(errors="replace").splitlines()
        task.errors.unlink()
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ") if lines else ""


def _run(task: Task, environment: dict[str, str], folder: str) -> None:
    """Be `python -m cvlab ARGUMENTS` in a forked process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path, flags in ((1, os.devnull, os.O_WRONLY), (2, task.errors, os.O_WRONLY | os.O_CREAT)):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["cvlab", *task.arguments]
    runpy.run_module("cvlab", run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    """Save and end when the process that started this one has died, however it died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
