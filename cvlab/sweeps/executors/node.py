"""One arm on whatever node an engine has put it: a child process that saves and ends when its parent dies."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from cvlab.errors import RunDirError
from cvlab.runs.interrupt import STOP_WITH_INPUT
from cvlab.sweeps.executors import ERRORS, POLL_SECONDS, TOKEN, Task, TaskResult, read_last_error

STORAGE_TIMEOUT_SECONDS = 10.0  # so long a network file system may take to show what another node has written
RemoteResult = tuple[int | None, str]  # exit code and last words; without a code the node must get no further arms


class RemoteTask(NamedTuple):
    """What a node is told: the arm, and the driver's folder and settings, in which it runs as it would there."""

    task: Task
    folder: str
    environment: Mapping[str, str]


def remote_task(task: Task) -> RemoteTask:
    """Return what a node is to be told about an arm."""
    return RemoteTask(task, str(Path.cwd()), cvlab_environment())


def cvlab_environment() -> dict[str, str]:
    """Return the variables of this process that speak to cvlab, for example where its data are."""
    return {key: value for key, value in os.environ.items() if key.startswith("CVLAB_")}


class TrialProcess:
    """The process of an arm."""

    def __init__(self, errand: RemoteTask) -> None:
        arm = errand.task.arm
        environment = {**os.environ, **errand.environment, STOP_WITH_INPUT: "1"}
        with (arm / ERRORS).open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cvlab", "resume", str(arm), "-q"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                cwd=errand.folder if Path(errand.folder).is_dir() else None,
                start_new_session=True,  # Ctrl-C reaches the driver, which asks in its own way
            )

    def wait(self) -> int:
        """Return the exit code. Polls: an engine's interrupt may be an exception that wakes no system call."""
        while (code := self.process.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code

    def stop(self) -> None:
        """Ask it to save and end, and wait for that; also from a signal handler that interrupts `wait`."""
        self.process.terminate()
        with contextlib.suppress(ChildProcessError):  # it has ended, and `wait` knows
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


def run(errand: RemoteTask, begun: Callable[[TrialProcess], None] = lambda _: None) -> RemoteResult:
    """Run an arm to its end; interrupted, ask it to save, and wait for that."""
    arm = errand.task.arm
    if not shares_storage(errand.task):
        run = arm.parents[1]
        return None, f"node {socket.gethostname()} does not see what the driver has written to {run}"
    child = TrialProcess(errand)
    begun(child)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.stop()
        code = child.wait()
    return code, read_last_error(arm)


def shares_storage(task: Task) -> bool:
    """Whether this node shares the disk with the driver that has sent it; a later driver has another word."""
    deadline = time.monotonic() + STORAGE_TIMEOUT_SECONDS
    while True:
        try:
            if (task.arm.parents[1] / TOKEN).read_text() == task.token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def task_result(task: Task, answer: RemoteResult) -> TaskResult:
    """Return how an arm has ended; RunDirError where its node does not see the sweep."""
    code, said = answer
    if code is None:
        raise RunDirError(said, "put the runs on storage that all nodes share, with --runs-dir")
    return TaskResult(task, code, said)
