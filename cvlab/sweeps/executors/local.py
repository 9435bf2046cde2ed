"""Arms beside each other on this machine, in processes forked from one that has torch loaded."""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from cvlab.runs.interrupt import StopRequest
from cvlab.sweeps.executors import ERRORS, POLL_SECONDS, Events, Limits, Take, Task, TaskResult, read_last_error

PRELOADED = (  # seconds of every arm
    "cvlab.cli.main",
    "cvlab.api.run",
    "cvlab.experiments.classification.train",
    "cvlab.reports.plots",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._dynamo",
)


def run(take: Take, limits: Limits, stop: StopRequest) -> Events:
    """Run each arm in a process of its own, one at a time unless told otherwise."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    running: dict[Any, tuple[Task, Any]] = {}
    asked = False
    try:
        while True:
            while stop.received is None and len(running) < (limits.workers or 1) and (task := take()) is not None:
                process = context.Process(target=_run, args=(task.arm, dict(os.environ), str(Path.cwd())))
                process.start()
                running[process.sentinel] = (task, process)
            if not running:
                return
            if stop.received is not None and not asked:
                asked = True
                _terminate(running)
            for sentinel in connection.wait(list(running), timeout=POLL_SECONDS):
                task, process = running.pop(sentinel)
                process.join()
                yield TaskResult(task, process.exitcode, read_last_error(task.arm))
            yield None
    finally:
        _terminate(running)
        for _, process in running.values():
            process.join()


def start_server() -> None:
    """Start the process that forks the arms, unless it runs; it loads torch while this one does other things.

    A signal to all of us must not end it before them; they are asked to stop one by one.
    """
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


def _run(arm: Path, environment: dict[str, str], folder: str) -> None:
    """Be `python -m cvlab resume ARM` in a forked process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path, flags in ((1, os.devnull, os.O_WRONLY), (2, arm / ERRORS, os.O_WRONLY | os.O_CREAT)):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["cvlab", "resume", str(arm), "-q"]
    runpy.run_module("cvlab", run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    """Save and end when the process that started this one has died, however it died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
