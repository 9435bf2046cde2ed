"""`cvlab doctor --faults`: kill and resume a training run on the user's disk, compare it with an unbroken one."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cvlab import portability
from cvlab.errors import CheckpointError, CvlabError
from cvlab.runs import checkpoint, find
from cvlab.runs.records import read_summary
from cvlab.storage import atomic

STEPS = 60
ARGUMENTS = (  # of a short training run
    *("quickstart", f"duration={{steps: {STEPS}}}", "data={name: scenes10, num_train: 500}", "batch_size=20"),
    *("evaluate_test=false", "expect=[]", "save_seconds=0", "eval_every=1000", "threads=1"),
)
TIMEOUT_SECONDS = 120


def run(root: Path, kills: int = 3, seed: int = 0) -> list[tuple[str, bool, str]]:
    """Kill and resume a short training run.

    Args:
        root: The folder of the runs; a temporary folder is made below it.
        kills: How often the run is killed.
        seed: Seed of the times at which it is killed.

    Returns:
        The checks: name, whether it holds, the result as text.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".faults-", dir=root))
    generator = random.Random(seed)
    try:
        expected = _finish(_start("train", *ARGUMENTS, root=folder / "whole"))
        checks = [_kill_repeatedly(folder / "killed", kills, generator)]
        is_same = _finish(_start("resume", "latest", root=folder / "killed")) == expected
        checks.append(
            (
                "resumed",
                is_same,
                "the same weights, bit for bit" if is_same else "not the weights of an uninterrupted run",
            )
        )
        leftovers = sorted(path.name for path in folder.rglob(f".*{atomic.TEMPORARY}"))
        checks.append(("left behind", not leftovers, ", ".join(leftovers) or "nothing"))
        return checks
    except (CvlabError, OSError, RuntimeError) as error:
        return [("faults", False, str(error))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(*arguments: str, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cvlab", *arguments, "--runs-dir", str(root), "-q", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: "subprocess.Popen[str]") -> Any:
    """Wait for a training run; return the digest of its weights. RuntimeError if it fails."""
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {(err or out).strip().splitlines()[-1:]}")
    return read_summary(Path(json.loads(out)["run"]))["weights_sha256"]


def _kill_repeatedly(root: Path, kills: int, generator: random.Random) -> tuple[str, bool, str]:
    """Start or resume the run and kill it while it saves, again and again; check that every checkpoint is intact."""
    damaged = killed = 0
    for number in range(kills):
        arguments = ("train", *ARGUMENTS) if number == 0 else ("resume", "latest")
        process = _start(*arguments, root=root)
        _wait_for_a_new_step(root, process)
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.communicate()
        killed += process.returncode == portability.KILLED_CODE
        for file in _checkpoints(root).glob("*.pt"):
            try:
                checkpoint.load(file)
            except CheckpointError:
                damaged += 1
    text = f"{killed} times while saving, {damaged} damaged checkpoints"
    return "kill -9", damaged == 0 and killed > 0, text


def _wait_for_a_new_step(root: Path, process: "subprocess.Popen[str]") -> None:
    before = _newest(root)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while _newest(root) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _newest(root: Path) -> int:
    return max(checkpoint.steps(_checkpoints(root)), default=-1)


def _checkpoints(root: Path) -> Path:
    """Return the folder of the newest run's checkpoints, also where there is no link `latest`."""
    return Path(root, *(run.name for run in find.list_runs(root)[-1:]), "checkpoints")
