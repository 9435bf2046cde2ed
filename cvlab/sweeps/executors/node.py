"""Run one trial on a node of a cluster: a child process that saves and exits when its parent dies."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from cvlab import portability
from cvlab.errors import RunDirError
from cvlab.runs.interrupt import STOP_WITH_INPUT
from cvlab.storage.regular_files import read_bytes
from cvlab.sweeps.executors import POLL_SECONDS, TOKEN, Task, TaskResult, open_errors, read_last_error

STORAGE_TIMEOUT_SECONDS = 10.0  # for a network file system to show what another node has written
MAX_TOKEN_BYTES = 1000
RemoteResult = tuple[int | None, str]  # exit code and last message; None as code: the node does not share the storage


class RemoteTask(NamedTuple):
    """What is sent to a node: the trial, and the working directory and settings of the scheduler."""

    task: Task
    folder: str
    environment: Mapping[str, str]


def remote_task(task: Task) -> RemoteTask:
    """Return what is sent to a node to run a trial."""
    return RemoteTask(task, str(Path.cwd()), cvlab_environment())


def cvlab_environment() -> dict[str, str]:
    """Return the environment variables of this process that configure cvlab."""
    return {key: value for key, value in os.environ.items() if key.startswith("CVLAB_")}


class TrialProcess:
    """The process of a trial."""

    def __init__(self, remote: RemoteTask) -> None:
        trial = remote.task.trial
        environment = {**os.environ, **remote.environment, STOP_WITH_INPUT: "1"}
        with os.fdopen(open_errors(trial), "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cvlab", "resume", str(trial), "-q", "--trust"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                cwd=remote.folder if Path(remote.folder).is_dir() else None,
                start_new_session=True,  # Ctrl-C reaches the scheduler, which stops the trials itself
            )

    def wait(self) -> int:
        """Wait for the exit code by polling, since an executor's interrupt may not wake a system call."""
        while (code := self.process.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code

    def stop(self) -> None:
        """Ask the trial to save and exit, and wait; also called from signal handlers that interrupt `wait`."""
        self.process.terminate()
        with contextlib.suppress(ChildProcessError):  # it has exited already
            portability.wait_for_exit(self.process.pid)


def run(remote: RemoteTask, on_start: Callable[[TrialProcess], None] = lambda _: None) -> RemoteResult:
    """Run a trial to its end; when interrupted, ask it to save and wait."""
    trial = remote.task.trial
    if not shares_storage(remote.task):
        run = trial.parents[1]
        return None, f"node {socket.gethostname()} does not see the files of the sweep in {run}"
    process = TrialProcess(remote)
    on_start(process)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.stop()
        code = process.wait()
    return code, read_last_error(trial)


def shares_storage(task: Task) -> bool:
    """Return whether this node shares the storage with the scheduler; a later scheduler has another token."""
    deadline = time.monotonic() + STORAGE_TIMEOUT_SECONDS
    while True:
        try:
            if read_bytes(task.trial.parents[1] / TOKEN, MAX_TOKEN_BYTES) == task.token.encode():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def task_result(task: Task, result: RemoteResult) -> TaskResult:
    """Return how a trial has ended.

    Raises:
        RunDirError: if its node does not share the storage.
    """
    code, message = result
    if code is None:
        raise RunDirError(message, "put the runs on storage that all nodes share, with --runs-dir")
    return TaskResult(task, code, message)
