"""Ctrl-C, a closed terminal and job control on a pseudo terminal."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cvlab.runs import checkpoint
from cvlab.runs.records import read_metrics, read_status
from tests.faults.texts import CONFIG, SWEEP

CTRL_C, CTRL_BACKSLASH = b"\x03", b"\x1c"
SHOW_CURSOR = b"\x1b[?25h"


class Terminal:
    """A `cvlab` command line in a session of its own, with a terminal that types and reads."""

    def __init__(self, *arguments, prefix=()):
        self.master, slave = pty.openpty()
        command = [*prefix, sys.executable, "-m", "cvlab", *map(str, arguments)]
        started = {"stdin": slave, "stdout": slave, "stderr": slave, "env": {**os.environ, "TERM": "xterm"}}
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=self._control, **started)  # noqa: PLW1509
        os.close(slave)
        self.shown = b""

    @staticmethod
    def _control():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read(self):
        """Take what has been shown; a terminal that is full would stop the program."""
        while self.master is not None and self._has_output():
            try:
                self.shown += os.read(self.master, 65536)
            except OSError:  # the other side has closed
                break

    def _has_output(self):
        poll = select.poll()  # select() takes no descriptor beyond 1023
        poll.register(self.master, select.POLLIN)
        return bool(poll.poll(0))

    def until(self, holds, seconds=60):
        deadline = time.monotonic() + seconds
        while not holds():
            self.read()
            assert self.process.poll() is None, (self.process.returncode, self.shown)
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.01)

    def type(self, keys):
        os.write(self.master, keys)

    def hang_up(self):
        os.close(self.master)
        self.master = None

    def wait(self, seconds=60):
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.01)
        self.read()
        return self.process.returncode

    def group(self):
        """Return the processes of its session that are alive."""
        alive = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                alive += [stat.parent.name] if int(session) == self.process.pid and state != "Z" else []
        return alive


def steps_of(run):
    with contextlib.suppress(Exception):
        rows = list(read_metrics(run))
        return rows[-1]["step"] if rows else 0
    return 0


@pytest.fixture
def training(tmp_path, data_root):
    """Start a training on a terminal, ten steps on its way; give it and its run directory."""
    from cvlab.experiments.classification.data import scenes10

    scenes10.load(data_root)
    (tmp_path / "c.yaml").write_text(CONFIG)
    started = []

    def start(*more, prefix=()):
        terminal = Terminal("train", tmp_path / "c.yaml", "--runs-dir", tmp_path / "runs", *more, prefix=prefix)
        started.append(terminal)
        run = tmp_path / "runs" / "latest"
        terminal.until(lambda: steps_of(run) >= 10)
        return terminal, run

    yield start
    for terminal in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(terminal.process.pid, signal.SIGKILL)


def saved_all(run):
    return checkpoint.steps(run / "checkpoints")[-1] >= steps_of(run)


def test_ctrl_c_saves_logs_and_restores_the_terminal(training):
    terminal, run = training()
    terminal.type(CTRL_C)
    assert terminal.wait() == 130
    assert saved_all(run)
    assert b"checkpoint saved; continue with `cvlab resume" in terminal.shown
    assert b"Traceback" not in terminal.shown
    hidden, shown = terminal.shown.rfind(b"\x1b[?25l"), terminal.shown.rfind(SHOW_CURSOR)
    assert hidden < shown, "the cursor is seen again"
    assert read_status(run)["status"] == "interrupted"
    assert terminal.group() == []


@pytest.mark.faults
def test_a_second_ctrl_c_ends_at_once(training):
    terminal, run = training()
    terminal.type(CTRL_C)
    terminal.type(CTRL_C)
    assert terminal.wait(10) == 130
    assert terminal.group() == []
    assert checkpoint.load_latest(run / "checkpoints", print)


@pytest.mark.faults
def test_a_closed_terminal_is_a_request_to_save(training):
    terminal, run = training()
    terminal.hang_up()
    assert terminal.wait() == 143
    assert saved_all(run)
    state = read_status(run)
    assert state["status"] == "interrupted"
    assert "SIGHUP" in state["error"]


@pytest.mark.faults
def test_a_run_under_nohup_survives_its_terminal(training):
    terminal, run = training(prefix=("nohup",))
    terminal.hang_up()
    before = steps_of(run)
    deadline = time.monotonic() + 60
    while steps_of(run) < before + 20:
        assert terminal.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 143
    assert saved_all(run)


@pytest.mark.faults
def test_quit_is_a_kill(training, cvlab):
    terminal, run = training()
    terminal.type(CTRL_BACKSLASH)
    assert terminal.wait() == -signal.SIGQUIT
    assert read_status(run)["status"] == "interrupted"
    assert checkpoint.load_latest(run / "checkpoints", print)


@pytest.mark.faults
def test_stopped_and_continued_by_job_control(training):
    terminal, run = training()
    os.killpg(terminal.process.pid, signal.SIGSTOP)
    time.sleep(0.3)
    before = steps_of(run)
    time.sleep(0.3)
    assert steps_of(run) == before
    os.killpg(terminal.process.pid, signal.SIGCONT)
    terminal.until(lambda: steps_of(run) > before + 10)
    terminal.type(CTRL_C)
    assert terminal.wait() == 130
    assert saved_all(run)


@pytest.mark.faults
@pytest.mark.parametrize("end", ["ctrl_c", "hang_up", "kill"])
def test_a_sweep_stops_with_all_its_trials_and_resumes(tmp_path, data_root, cvlab, end):
    from cvlab.experiments.classification.data import scenes10

    scenes10.load(data_root)
    (tmp_path / "s.yaml").write_text(SWEEP)
    terminal = Terminal("sweep", tmp_path / "s.yaml", "--workers", "2", "--runs-dir", tmp_path / "runs")
    run = tmp_path / "runs" / "latest"
    terminal.until(lambda: all(steps_of(trial) >= 10 for trial in run.glob("trials/*")) and list(run.glob("trials/*")))
    if end == "ctrl_c":
        terminal.type(CTRL_C)
        assert terminal.wait() == 130, terminal.shown
    elif end == "hang_up":
        terminal.hang_up()
        assert terminal.wait() == 143
    else:
        terminal.process.kill()
        assert terminal.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while terminal.group():
        assert time.monotonic() < deadline, "a trial survives its sweep"
        time.sleep(0.05)
    trials = sorted(run.glob("trials/*"))
    assert len(trials) == 2
    assert all(saved_all(trial) for trial in trials)
    assert {read_status(trial)["status"] for trial in trials} == {"interrupted"}
    assert read_status(run)["status"] == "interrupted"
