"""Ranks end soon after their launcher, also before they have joined the process group."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cvlab.distributed.process_group import LAUNCHER, World
from tests.distributed.ranks import free_port

PARENT = """
import os, subprocess, sys, time
from pathlib import Path
if sys.argv[2] == "launcher id":
    os.environ["CVLAB_LAUNCHER"] = str(os.getpid())
rank = subprocess.Popen([sys.executable, "-m", "cvlab", "train", "quickstart", "--runs-dir", sys.argv[1]])
Path(sys.argv[1], "rank").write_text(str(rank.pid))
time.sleep(600)
"""


def is_alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(  # a rank that starts after the death of its launcher needs its id to detect that
    ("kind", "seconds"),
    [
        *(("launcher id", 0.0), ("torchrun", 4.0)),
        *(pytest.param(*case, marks=pytest.mark.faults) for case in (("launcher id", 1.0), ("launcher id", 4.0))),
        pytest.param("torchrun", 1.0, marks=pytest.mark.faults),
    ],
)
def test_a_rank_that_waits_for_others_ends_with_its_launcher(tmp_path, seconds, kind):
    torchrun_environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {key: value for key, value in os.environ.items() if key != LAUNCHER} | torchrun_environment
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), kind], env=environment)
    file = tmp_path / "rank"
    assert wait_for(lambda: file.exists() and file.read_text(), 30)
    rank = int(file.read_text())
    time.sleep(seconds)
    assert is_alive(rank)
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not is_alive(rank), 20), "a rank has outlived its launcher"


def test_killing_the_launcher_of_nproc_at_once_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "cvlab", "train", "quickstart", "--nproc=2", f"--runs-dir={tmp_path}", "threads=1"]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ranks = []

    def find_ranks():
        command = ["ps", "--ppid", str(launcher.pid), "-o", "pid=,args="]
        raw = subprocess.run(command, check=False, capture_output=True, text=True)
        ranks[:] = [int(line.split()[0]) for line in raw.stdout.splitlines() if "resume" in line]
        return len(ranks) == 2

    try:
        assert wait_for(find_ranks, 120)
    finally:
        launcher.kill()
        launcher.wait()
    assert wait_for(lambda: not any(map(is_alive, ranks)), 20), "ranks have outlived their launcher"


def test_the_launcher_of_a_rank_is_read_from_the_environment_or_the_parent():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert World.from_environment({**environment, LAUNCHER: "17"}).launcher == 17
    assert World.from_environment(environment).launcher == os.getppid()
    assert World.from_environment({**environment, LAUNCHER: "x"}).launcher == os.getppid()
