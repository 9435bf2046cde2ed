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
    """A `cvlab` command in a new session on a pseudo terminal."""

    def __init__(self, *arguments, prefix=()):
        self.controller, terminal_fd = pty.openpty()
        command = [*prefix, sys.executable, "-m", "cvlab", *map(str, arguments)]
        options = {
            "stdin": terminal_fd,
            "stdout": terminal_fd,
            "stderr": terminal_fd,
            "env": {**os.environ, "TERM": "xterm"},
        }
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=self._control, **options)  # noqa: PLW1509
        os.close(terminal_fd)
        self.output = b""

    @staticmethod
    def _control():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read(self):
        """Read the output so far; a full buffer would block the program."""
        while self.controller is not None and self._has_output():
            try:
                self.output += os.read(self.controller, 65536)
            except OSError:  # the other side has closed
                break

    def _has_output(self):
        poll = select.poll()  # select() takes no descriptor beyond 1023
        poll.register(self.controller, select.POLLIN)
        return bool(poll.poll(0))

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            self.read()
            assert self.process.poll() is None, (self.process.returncode, self.output)
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def type(self, keys):
        os.write(self.controller, keys)

    def hang_up(self):
        os.close(self.controller)
        self.controller = None

    def wait(self, seconds=60):
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < deadline, "the process does not end"
            time.sleep(0.01)
        self.read()
        return self.process.returncode

    def group(self):
        """Return the live processes of the session."""
        alive = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                alive += [stat.parent.name] if int(session) == self.process.pid and state != "Z" else []
        return alive


def last_step(run):
    with contextlib.suppress(Exception):
        rows = list(read_metrics(run))
        return rows[-1]["step"] if rows else 0
    return 0


@pytest.fixture
def start_training(tmp_path, data_root):
    """Return a function that starts a training run and returns its terminal and run directory after ten steps."""
    from cvlab.experiments.classification.data import scenes10

    scenes10.load(data_root)
    (tmp_path / "c.yaml").write_text(CONFIG)
    started = []

    def start(*overrides, prefix=()):
        terminal = Terminal("train", tmp_path / "c.yaml", "--runs-dir", tmp_path / "runs", *overrides, prefix=prefix)
        started.append(terminal)
        run = tmp_path / "runs" / "latest"
        terminal.until(lambda: last_step(run) >= 10)
        return terminal, run

    yield start
    for terminal in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(terminal.process.pid, signal.SIGKILL)


def last_step_is_saved(run):
    return checkpoint.steps(run / "checkpoints")[-1] >= last_step(run)


def test_ctrl_c_saves_logs_and_restores_the_terminal(start_training):
    terminal, run = start_training()
    terminal.type(CTRL_C)
    assert terminal.wait() == 130
    assert last_step_is_saved(run)
    assert b"checkpoint saved; continue with `cvlab resume" in terminal.output
    assert b"Traceback" not in terminal.output
    hidden, visible = terminal.output.rfind(b"\x1b[?25l"), terminal.output.rfind(SHOW_CURSOR)
    assert hidden < visible, "the cursor is visible again"
    assert read_status(run)["status"] == "interrupted"
    assert terminal.group() == []


@pytest.mark.faults
def test_a_second_ctrl_c_exits_immediately(start_training):
    terminal, run = start_training()
    terminal.type(CTRL_C)
    terminal.type(CTRL_C)
    assert terminal.wait(10) == 130
    assert terminal.group() == []
    assert checkpoint.load_latest(run / "checkpoints", print)


@pytest.mark.faults
def test_closing_the_terminal_saves_and_exits(start_training):
    terminal, run = start_training()
    terminal.hang_up()
    assert terminal.wait() == 143
    assert last_step_is_saved(run)
    state = read_status(run)
    assert state["status"] == "interrupted"
    assert "SIGHUP" in state["error"]


@pytest.mark.faults
def test_a_run_under_nohup_survives_its_terminal(start_training):
    terminal, run = start_training(prefix=("nohup",))
    terminal.hang_up()
    before = last_step(run)
    deadline = time.monotonic() + 60
    while last_step(run) < before + 20:
        assert terminal.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 143
    assert last_step_is_saved(run)


@pytest.mark.faults
def test_sigquit_kills_the_run(start_training, cvlab):
    terminal, run = start_training()
    terminal.type(CTRL_BACKSLASH)
    assert terminal.wait() == -signal.SIGQUIT
    assert read_status(run)["status"] == "interrupted"
    assert checkpoint.load_latest(run / "checkpoints", print)


@pytest.mark.faults
def test_a_run_can_be_stopped_and_continued_by_job_control(start_training):
    terminal, run = start_training()
    os.killpg(terminal.process.pid, signal.SIGSTOP)
    time.sleep(0.3)
    before = last_step(run)
    time.sleep(0.3)
    assert last_step(run) == before
    os.killpg(terminal.process.pid, signal.SIGCONT)
    terminal.until(lambda: last_step(run) > before + 10)
    terminal.type(CTRL_C)
    assert terminal.wait() == 130
    assert last_step_is_saved(run)


@pytest.mark.faults
@pytest.mark.parametrize("end", ["ctrl_c", "hang_up", "kill"])
def test_a_sweep_stops_with_all_its_trials_and_resumes(tmp_path, data_root, cvlab, end):
    from cvlab.experiments.classification.data import scenes10

    scenes10.load(data_root)
    (tmp_path / "s.yaml").write_text(SWEEP)
    terminal = Terminal("sweep", tmp_path / "s.yaml", "--workers", "2", "--runs-dir", tmp_path / "runs")
    run = tmp_path / "runs" / "latest"
    terminal.until(lambda: all(last_step(trial) >= 10 for trial in run.glob("trials/*")) and list(run.glob("trials/*")))
    if end == "ctrl_c":
        terminal.type(CTRL_C)
        assert terminal.wait() == 130, terminal.output
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
    assert all(last_step_is_saved(trial) for trial in trials)
    assert {read_status(trial)["status"] for trial in trials} == {"interrupted"}
    assert read_status(run)["status"] == "interrupted"
