"""Run tiny training runs in forked children and kill them: `python -m tests.faults.server SCENARIO FOLDER COUNT`.

A fork of a process that has imported torch starts in milliseconds, so that hundreds of kills fit into a test. The
parent computes nothing and has one thread, so that forking is safe. Prints one JSON document.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

os.environ.setdefault("CVLAB_FAILPOINT", "none")  # cvlab reads it when it is imported

from cvlab.cli import main
from cvlab.engine import checkpointer
from cvlab.errors import CheckpointError
from cvlab.runs import checkpoint
from cvlab.runs.records import read_metrics, read_status
from tests import tiny
from tests.faults.texts import CONFIG

torch.set_num_threads(1)
RANDOM = random.Random(int(os.environ.get("FAULT_SEED", "0")))
FAILPOINTS = ("open", "mid_write", "before_fsync", "before_rename", "after_rename", "before_dirsync", "before_gc")


def in_child(work):
    """Fork, call `work()`, and return the child's pid; the child exits with what `work` returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work() or 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid):
    """Return a child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid, seconds):
    """Kill a child after a while; return whether it was still running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def train(path, num_steps=tiny.STEPS):
    """Return a function that trains the tiny model, saving after every step, and writes its digest to a file."""

    def work():
        checkpointer.MAX_CHECKPOINT_OVERHEAD = math.inf
        metrics, summary = tiny.train(path, tiny.settings(save_seconds=0.0, duration={"steps": num_steps}))
        (path / "digest").write_text(json.dumps([summary, tiny.untimed(metrics), tiny.rows(path)]))

    return work


def corrupt_files(path):
    """Return the number of checkpoints of a run with a wrong checksum."""
    count = 0
    for file in (path / "checkpoints").glob("*.pt"):
        try:
            checkpoint.load(file)
        except CheckpointError:
            count += 1
    return count


def reference(folder, num_steps=tiny.STEPS):
    """Train without interruption and return the digest."""
    assert wait(in_child(train(folder / "reference", num_steps))) == 0
    return (folder / "reference" / "digest").read_text()


def kills(folder, count):
    """Kill at random times and resume until the run is done; repeat for `count` kills and `count // 10` runs."""
    expected = reference(folder)
    result = {"kills": 0, "runs": 0, "corrupt": 0, "different": 0}
    while result["kills"] < count or result["runs"] < count // 10:  # on a busy machine, runs need more kills
        path = folder / f"run{result['runs']}"
        while True:
            killed = kill_after(in_child(train(path)), RANDOM.uniform(0.03, 0.25))
            result["corrupt"] += corrupt_files(path)
            if not killed:
                break
            result["kills"] += 1
        result["runs"] += 1
        result["different"] += (path / "digest").read_text() != expected
        shutil.rmtree(path)
    return result


def failpoints(folder, count):
    """Exit at each failpoint of the first `count` saves, then resume for a few steps."""
    num_steps = 8 + count
    expected = reference(folder, num_steps)
    result = {"died": 0, "corrupt": 0, "different": 0, "temporary_files": 0}
    for name in FAILPOINTS:
        for number in range(1, count + 1):
            path = folder / f"{name}-{number}"

            def work(path=path, name=name, number=number):
                os.environ["CVLAB_FAILPOINT"] = f"{name}:{number}"
                train(path, num_steps)()

            result["died"] += wait(in_child(work)) == -signal.SIGKILL
            result["corrupt"] += corrupt_files(path)
            assert wait(in_child(train(path, num_steps))) == 0
            result["different"] += (path / "digest").read_text() != expected
            result["temporary_files"] += len(list(path.rglob(".*.tmp")))
    return result


def naive(folder, count):
    """Kill a writer that overwrites one file with `torch.save`: the harness must detect corrupt files."""
    path = folder / "naive.pt"
    corrupt = 0

    def work():
        state = {"model": torch.zeros(5_000_000)}
        while True:
            torch.save(state, path)

    for _ in range(count):
        kill_after(in_child(work), RANDOM.uniform(0.1, 0.25))
        try:
            torch.load(path, weights_only=True)
        except Exception:
            corrupt += 1
    return {"kills": count, "corrupt": corrupt}


def _wait_for_steps(root):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = list(read_metrics(root / "latest"))
        if rows and rows[-1]["step"] >= 10:
            return
        time.sleep(0.01)
    raise TimeoutError("no step was taken")


def _wait_for_step_after(run, step, pid):
    """Wait until a resumed run has taken five more steps, then stop it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = list(read_metrics(run))
        resumed = "resumed step_" in (run / "log.txt").read_text()
        if resumed and rows and rows[-1]["step"] > step + 5:
            break
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)


def signals(folder, count):
    """Send each signal to `cvlab train`, then resume; return exit codes and the steps of the checkpoints."""
    (folder / "c.yaml").write_text(CONFIG)
    results = {}
    for names in (("SIGTERM",), ("SIGUSR1",), ("SIGINT",), ("SIGINT", "SIGINT"), ("SIGKILL",))[:count]:
        root = folder / "-".join(names)
        arguments = ["--runs-dir", str(root), "--json", "-q"]
        pid = in_child(lambda a=arguments: main.main(["train", str(folder / "c.yaml"), *a]))
        _wait_for_steps(root)
        for name in names:
            os.kill(pid, getattr(signal, name))
        code = wait(pid)
        run = root / "latest"
        rows = list(read_metrics(run))
        newest = checkpoint.steps(run / "checkpoints")[-1]
        state = read_status(run)
        # The lock is free, so that the run can be resumed.
        resumed = in_child(lambda a=arguments: main.main(["resume", "latest", *a]))
        _wait_for_step_after(run, newest, resumed)
        results["-".join(names)] = {
            "code": code,
            "status": state["status"],
            "saved": newest,
            "logged": rows[-1]["step"],
            "resume": wait(resumed),
            "later": checkpoint.steps(run / "checkpoints")[-1],
        }
    return results


def disk_full(folder, count):
    """Limit the size of files from some step on: exit code 5, no temporary file, a valid previous checkpoint."""
    (folder / "c.yaml").write_text(CONFIG)
    root = folder / "runs"

    def work():
        save = checkpoint.save

        def save_with_limit(path, step, state, is_best=False):
            if step > 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            return save(path, step, state, is_best)

        checkpoint.save = save_with_limit
        checkpointer.MAX_CHECKPOINT_OVERHEAD = math.inf
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        main.main(["train", str(folder / "c.yaml"), "save_seconds=0", "--runs-dir", str(root), "-q"])

    code = wait(in_child(work))
    run = root / "latest"
    return {
        "code": code,
        "corrupt": corrupt_files(run),
        "saved": checkpoint.steps(run / "checkpoints"),
        "temporary_files": len(list(run.resolve().rglob(".*.tmp"))),
        "status": read_status(run)["status"],
    }


SCENARIOS = {f.__name__: f for f in (kills, failpoints, naive, signals, disk_full)}


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    print(json.dumps(SCENARIOS[sys.argv[1]](folder, int(sys.argv[3]))))
