"""`cvlab doctor --faults`: a training killed on the user's own disk, resumed, and compared with one that was not."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cvlab.errors import CheckpointError, CvlabError
from cvlab.runs import checkpoint
from cvlab.runs.records import read_summary
from cvlab.storage import atomic

STEPS = 60
SHORT = (
    *("quickstart", f"duration={{steps: {STEPS}}}", "data={name: scenes10, num_train: 500}", "batch_size=20"),
    *("evaluate_test=false", "expect=[]", "save_seconds=0", "eval_every=1000", "threads=1"),
)
PATIENCE_SECONDS = 120


def run(root: Path, kills: int = 3, seed: int = 0) -> list[tuple[str, bool, str]]:
    """Kill a short training `kills` times in a folder below `root`; return (check, whether it holds, found)."""
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".faults-", dir=root))
    draw = random.Random(seed)
    try:
        wanted = _finish(_start("train", *SHORT, root=folder / "whole"))
        found = [_killed(folder / "killed", kills, draw)]
        same = _finish(_start("resume", "latest", root=folder / "killed")) == wanted
        found.append(("resumed", same, "the same weights, bit for bit" if same else "other weights than undisturbed"))
        left = sorted(path.name for path in folder.rglob(f".*{atomic.TEMPORARY}"))
        found.append(("left behind", not left, ", ".join(left) or "nothing"))
        return found
    except (CvlabError, OSError, RuntimeError) as error:
        return [("faults", False, str(error))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(*words: str, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cvlab", *words, "--runs-dir", str(root), "-q", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: "subprocess.Popen[str]") -> Any:
    """Wait for a training; return the digest of its weights. RuntimeError where it fails."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {(err or out).strip().splitlines()[-1:]}")
    return read_summary(Path(json.loads(out)["run"]))["weights_sha256"]


def _killed(root: Path, kills: int, draw: random.Random) -> tuple[str, bool, str]:
    """Start, kill -9 while it saves after each step, start again; see whether every checkpoint is whole."""
    damaged = happened = 0
    for number in range(kills):
        words = ("train", *SHORT) if number == 0 else ("resume", "latest")
        process = _start(*words, root=root)
        _wait_for_a_new_step(root, process)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        happened += process.returncode == -signal.SIGKILL
        for file in (root / "latest" / "checkpoints").glob("*.pt"):
            try:
                checkpoint.load(file)
            except CheckpointError:
                damaged += 1
    told = f"{happened} times while saving, {damaged} damaged checkpoints"
    return "kill -9", damaged == 0 and happened > 0, told


def _wait_for_a_new_step(root: Path, process: "subprocess.Popen[str]") -> None:
    before = _newest(root)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while _newest(root) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _newest(root: Path) -> int:
    return max(checkpoint.steps(root / "latest" / "checkpoints"), default=-1)
