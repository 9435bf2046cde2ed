"""Trials beside each other on this machine, on Linux in processes forked from one that has torch loaded."""

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any

from cvlab import portability
from cvlab.runs.interrupt import StopRequest
from cvlab.sweeps.executors import (
    POLL_SECONDS,
    Events,
    Limits,
    NextTask,
    Task,
    TaskResult,
    open_errors,
    read_last_error,
)

PRELOADED = (  # imports that would cost each trial seconds
    "cvlab.cli.main",
    "cvlab.api.run",
    "cvlab.experiments.classification.setup",
    "cvlab.reports.html",
    "cvlab.reports.plots",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich.progress",
)


def run(next_task: NextTask, limits: Limits, stop: StopRequest) -> Events:
    """Run each trial in its own process, one at a time unless `limits.workers` is set."""
    start_server()
    context: Any = multiprocessing.get_context(portability.START_METHOD)
    running: dict[Any, tuple[Task, Any]] = {}
    is_stopping = False
    try:
        while True:
            while stop.received is None and len(running) < (limits.workers or 1) and (task := next_task()) is not None:
                process = context.Process(target=_run, args=(task.trial, dict(os.environ), str(Path.cwd())))
                with _without_main_module():
                    process.start()
                running[process.sentinel] = (task, process)
            if not running:
                return
            if stop.received is not None and not is_stopping:
                is_stopping = True
                _terminate(running)
            for sentinel in connection.wait(list(running), timeout=POLL_SECONDS):
                task, process = running.pop(sentinel)
                process.join()
                yield TaskResult(task, process.exitcode, read_last_error(task.trial))
            yield None
    finally:
        _terminate(running)
        for _, process in running.values():
            process.join()


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide the program that runs: `multiprocessing` would run a script again in each trial, and with it the sweep."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def start_server() -> None:
    """Start the process that forks the trials, unless it runs or trials are not forked; it imports torch meanwhile.

    It ignores the signals that stop a sweep, because the trials are asked to stop one by one.
    """
    if portability.START_METHOD != "forkserver":
        return
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    before = {number: signal.signal(number, signal.SIG_IGN) for number in StopRequest.SIGNALS}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(running: Mapping[Any, tuple[Task, Any]]) -> None:
    for _, process in running.values():
        process.terminate()


def _run(trial: Path, environment: dict[str, str], folder: str) -> None:
    """Run `python -m cvlab resume TRIAL` in a forked process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # the garbage collector need not copy and search the memory of what is imported
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, opened in ((1, os.open(os.devnull, os.O_WRONLY)), (2, open_errors(trial))):
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["cvlab", "resume", str(trial), "-q", "--trust"]
    runpy.run_module("cvlab", run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    """Save and exit when the parent process has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    portability.terminate_self()
