"""Trackers while a run is in progress: `trackers: [tensorboard]` in a configuration.

Each is a process of low priority that runs `cvlab track RUN --follow`, so it can neither stop nor slow the run: it
reads the run directory, and nothing waits for it before the run has ended. One that fails or hangs is a warning.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from cvlab import console, portability
from cvlab.api import track
from cvlab.distributed import process_group
from cvlab.errors import CvlabError
from cvlab.runs.interrupt import STOP_WITH_INPUT
from cvlab.runs.run_dir import RunDir
from cvlab.storage import regular_files

WAIT_SECONDS = 60.0  # at most, for all trackers, after the run has ended
INTERRUPTED_WAIT_SECONDS = 5.0  # after it was interrupted or has failed
MAX_LOG_BYTES = 2**16
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
NOT_INHERITED = (*process_group.REQUIRED_VARIABLES, STOP_WITH_INPUT)


@dataclass
class _Process:
    name: str
    process: "subprocess.Popen[bytes]"


class LiveTrackers:
    """The trackers of a run in progress.

    Args:
        out: The run directory.
        names: Names of trackers, which are installed.
    """

    def __init__(self, out: RunDir, names: Sequence[str]) -> None:
        self.out = out
        self.processes: list[_Process] = []
        for name in names if out.writable else ():
            try:
                self.processes.append(_Process(name, self._start(name)))
            except (OSError, CvlabError) as error:
                self._warn(name, str(error))

    def _start(self, name: str) -> "subprocess.Popen[bytes]":
        """Start a tracker in a session of its own, where it does not receive the terminal's Ctrl-C."""
        self.out.folder(track.FOLDER)
        command = [sys.executable, "-m", "cvlab", "track", str(self.out.path.absolute()), "--to", name, "--follow"]
        environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        with self._open(f"{name}.txt") as output, self._open(f"{name}.log") as log:  # no pipe: nobody would empty it
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=environment | ENVIRONMENT,
                start_new_session=True,
            )
        portability.lower_session_priority(process.pid)  # from its first import on
        return process

    def _open(self, name: str) -> IO[bytes]:
        path = self.out.path / track.FOLDER / name
        return os.fdopen(regular_files.open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")

    def finish(self, has_ended: bool) -> None:
        """Wait until all trackers have logged the end of the run, but not for long; log a line about each.

        Args:
            has_ended: Whether the run has its result.
        """
        deadline = time.monotonic() + (WAIT_SECONDS if has_ended else INTERRUPTED_WAIT_SECONDS)
        for tracker in self.processes:
            try:
                code = tracker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                portability.kill_session(tracker.process)
                self._warn(tracker.name, "it has not finished and was stopped")
                continue
            except BaseException:
                portability.kill_session(tracker.process)
                raise
            if code == 0:
                self._log(f"{tracker.name}: {self._last_line(f'{tracker.name}.txt')}")
            else:
                line = self._last_line(f"{tracker.name}.log").removeprefix("error: ")
                self._warn(tracker.name, line or f"it ended with code {code}")
        self.processes = []

    def _last_line(self, name: str) -> str:
        try:
            text = regular_files.read_tail(self.out.path / track.FOLDER / name, MAX_LOG_BYTES)
        except OSError:
            return ""
        lines = text.decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def _warn(self, name: str, reason: str) -> None:
        command = f"cvlab track {self.out.path.name} --to {name}"
        self._log(f"warning: tracker {name}: {reason}; `{command}` logs the run again")

    def _log(self, line: str) -> None:
        try:
            self.out.log(line)
        except CvlabError:  # the run directory was removed, or the disk is full
            console.info(line)
