"""Faults of every kind of experiment: `python -m tests.faults.kinds SCENARIO FOLDER COUNT`, in forks like server.py."""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.server import RANDOM, in_child, kill_after, wait

from tests.faults.server import corrupt_files  # isort: skip - first torch

from PIL import Image

from cvlab.cli import main
from cvlab.engine import checkpointer, image_optimizer
from cvlab.experiments.captioning import scene_captions
from cvlab.experiments.style.config import has_network
from cvlab.runs import checkpoint
from cvlab.runs.records import read_summary
from tests.faults.texts import (
    CLASSIFIER,
    CONFIG,
    KINDS,
    NEEDS_NETWORK,
    READERS,
    SWEEP_OF_KINDS,
    TRAIN_OVERRIDES,
    WRITERS,
)

PHASES = "'duration={epochs: 4}' batch_size=16 log_every=1 " + TRAIN_OVERRIDES
HEAD_STEPS = 2 * (76 // 16)  # the first two epochs, before the last stage of the backbone is trained
UNTIMED = ("train_seconds", "images_per_second", "seconds_per_photo", "seconds_of_steps", "seconds_of_network")


def outcome(run):
    """Return the metrics without times, the results, and the digests of weights and pictures of a run."""
    summary = read_summary(run)
    metrics = {name: value for name, value in summary["metrics"].items() if name not in UNTIMED}
    pictures = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "images").rglob("*.png"))
    }
    trials = [outcome(trial) for trial in sorted(run.glob("trials/*"))]
    return [metrics, summary.get("results"), summary.get("weights_sha256"), pictures, trials]


def difference(expected, actual):
    """Return the differences between two outcomes as text."""
    return [f"{a} != {b}" for a, b in zip(expected, actual, strict=True) if a != b]


def classes_of_noise(folder, count):
    """Write photos of two classes, coarse noise and fine noise."""
    for k in range(count):
        path = folder / "classes" / ("coarse", "fine")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.effect_noise((20, 16) if k % 2 else (200, 160), 20 + k)
        noise.resize((200, 160)).convert("RGB").save(path)


def command_lines(folder):
    """Return a short command line of each kind of experiment that saves a checkpoint after every step, by name."""
    photos = folder / "photos"
    photos.mkdir()
    for k in range(3):
        Image.effect_noise((90 + 10 * k, 80), 60 + 20 * k).convert("RGB").save(photos / f"{k}.png")
    classes_of_noise(folder, 12)
    (folder / "sweep.yaml").write_text(SWEEP_OF_KINDS)
    scene_captions.COUNTS = {"train": 12, "val": 4, "test": 4}
    checkpointer.MAX_CHECKPOINT_OVERHEAD = math.inf
    initial = image_optimizer.ImageOptimization.__init__
    initial.__defaults__ = tuple(0.0 if value == 60.0 else value for value in initial.__defaults__)
    trained = ["--runs-dir", str(folder / "trained"), "-q"]
    assert wait(in_child(lambda: main.main([*shlex.split(CLASSIFIER), "duration={steps: 60}", *trained]))) == 0
    return {
        name: [word.replace("{folder}", str(folder)) for word in shlex.split(line)]
        for name, line in KINDS.items()
        if name not in NEEDS_NETWORK or has_network()
    }


def kinds(folder, count):
    """Kill each kind of experiment up to `count` times and resume it; compare with an uninterrupted run."""
    results = {}
    for name, arguments in command_lines(folder).items():
        whole, killed = folder / name / "whole", folder / name / "killed"
        start_time = time.monotonic()
        assert wait(in_child(lambda a=arguments, r=whole: main.main([*a, "--runs-dir", str(r), "-q"]))) == 0, name
        seconds = time.monotonic() - start_time
        kills_done = 0
        while True:
            command = ["resume", "latest"] if (killed / "latest" / "config.yaml").is_file() else arguments
            shutil.rmtree(killed, ignore_errors=True) if command is arguments else None
            pid = in_child(lambda a=command, r=killed: main.main([*a, "--runs-dir", str(r), "-q"]))
            if kills_done == count:
                assert wait(pid) == 0, name
                break
            if not kill_after(pid, RANDOM.uniform(0.2, 0.8) * seconds):
                break
            kills_done += 1
        differ = difference(outcome(whole / "latest"), outcome(killed / "latest"))
        temporary_files = [path.name for path in (killed / "latest").resolve().rglob(".*.tmp")]
        results[name] = {
            "kills": kills_done,
            "differ": differ,
            "temporary_files": temporary_files,
            "corrupt": corrupt_files(killed / "latest"),
        }
    return results


def phases(folder, _count):
    """Kill a training run on photos while it decodes, computes features, trains its head and fine-tunes; resume it."""
    classes_of_noise(folder, 96)
    checkpointer.MAX_CHECKPOINT_OVERHEAD = math.inf
    model = "model={name: pretrained, views: 2, trainable_stages: 1, finetune_epochs: 2}"
    arguments = ["train", "photos", f"data.path={folder / 'classes'}", model, *shlex.split(PHASES)]

    def start(command, name):
        def run():
            os.environ["CVLAB_DATA"] = str(folder / name / "data")
            return main.main([*command, "--runs-dir", str(folder / name / "runs"), "-q"])

        return in_child(run)

    assert wait(start(arguments, "whole")) == 0
    killed = folder / "killed"

    def count_lines(pattern):
        return sum(len(path.read_bytes().splitlines()) for path in killed.glob(pattern))

    phase_conditions = {  # phase -> whether it has begun
        "decode": lambda: any(killed.glob("data/photos-*/*.rows")),
        "features": lambda: count_lines("data/features-*/*-features.jsonl") > 0,
        "head": lambda: count_lines("runs/latest/metrics.jsonl") > 2,
        "finetune": lambda: count_lines("runs/latest/metrics.jsonl") > HEAD_STEPS + 2,
    }
    results, command = {}, arguments
    for name, has_begun in phase_conditions.items():
        pid = start(command, "killed")
        while not has_begun():
            assert not os.waitpid(pid, os.WNOHANG)[0], f"the run ended before {name}"
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        results[name] = {"code": wait(pid), "cached": count_lines("data/*/*.jsonl")}
        command = ["resume", "latest"]
    assert wait(start(command, "killed")) == 0
    whole, resumed = folder / "whole" / "runs" / "latest", killed / "runs" / "latest"
    rows = {path.name: path.read_bytes() for path in (folder / "whole" / "data").rglob("*.rows")}
    same_cache = rows == {path.name: path.read_bytes() for path in (killed / "data").rglob("*.rows")}
    return results | {"end": {"differ": difference(outcome(whole), outcome(resumed)), "same_cache": same_cache}}


def _mount(options, path):
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)


def _run_captured(work, path):
    """Call a function in a child process; return its exit code and the lines of its output."""

    def redirected():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        return work()

    return wait(in_child(redirected)), path.read_text(errors="replace").splitlines()


def small_disks(folder, count):
    """Let each kind of experiment fill a small disk, `count` sizes each; then make the disk larger and resume it.

    Requires the right to mount file systems: `unshare --user --map-root-user --mount`.
    """
    disk, output = folder / "disk", folder / "output"
    results = {}
    for index, (name, arguments) in enumerate(command_lines(folder).items()):
        root = disk / "runs"
        _mount("size=1g", disk)
        code, lines = _run_captured(lambda a=arguments, r=root: main.main([*a, "--runs-dir", str(r), "-q"]), output)
        assert code == 0, (name, lines)
        whole = outcome(root / "latest")
        for page in root.rglob("*.html"):  # without room for its pages a run still ends with 0
            page.unlink()
        used = shutil.disk_usage(disk).used
        subprocess.run(["umount", str(disk)], check=True)
        for number in range(count):
            fraction = (number + (0.15, 0.4, 0.6)[index % 3]) / count
            _mount(f"size={max(8192, int(fraction * used))}", disk)
            code, lines = _run_captured(lambda a=arguments, r=root: main.main([*a, "--runs-dir", str(r), "-q"]), output)
            entry = {"code": code, "errors": [line for line in lines if line.startswith("error:")]}
            entry["traceback"] = any("Traceback" in line for line in lines)
            latest = root / "latest"
            entry |= {"corrupt": corrupt_files(latest), "temporary_files": len(list(root.rglob(".*.tmp")))}
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            command = ["resume", "latest"] if (latest / "config.yaml").is_file() else arguments
            entry["resumed"], lines = _run_captured(
                lambda a=command, r=root: main.main([*a, "--runs-dir", str(r), "-q"]), output
            )
            entry["same"] = entry["resumed"] == 0 and outcome(root / "latest") == whole
            entry["reason"] = "" if entry["same"] else lines[-3:]
            subprocess.run(["umount", str(disk)], check=True)
            results[f"{name} {fraction:.2f}"] = entry
    return results


def read_only(folder, count):
    """Mount the runs read-only; return the exit code and the errors of each command that reads or writes."""
    command_lines(folder)
    (folder / "c.yaml").write_text(CONFIG)
    root, output = folder / "runs", folder / "output"

    def train():
        save = checkpoint.save

        def save_and_exit(path, step, state, is_best=False):
            save(path, step, state, is_best)
            if step == 5:
                os._exit(9)

        checkpoint.save = save_and_exit
        main.main(["train", str(folder / "c.yaml"), "save_seconds=0", "--runs-dir", str(root), "-q"])

    assert wait(in_child(train)) == 9
    subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], check=True)
    results = {}
    for line in (*READERS, *WRITERS)[: count or None]:
        args = [word.replace("{folder}", str(folder)) for word in line.split()]
        code, lines = _run_captured(lambda a=args: main.main([*a, "--runs-dir", str(root)]), output)
        errors = [text for text in lines if text.startswith(("error:", "warning:"))]
        results[line] = {"code": code, "errors": errors, "traceback": any("Traceback" in text for text in lines)}
    return results


def removed(folder, count):
    """Remove the folder of a training run in progress; return its exit code and its output."""
    (folder / "c.yaml").write_text(CONFIG)
    results = {}
    for number in range(count):
        root = folder / f"runs{number}"
        arguments = ["train", str(folder / "c.yaml"), "save_seconds=0.2", "--runs-dir", str(root), "-q"]

        def work(arguments=arguments):
            descriptor = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 2)
            main.main(arguments)

        pid = in_child(work)
        deadline = time.monotonic() + 60
        while not any((root / "latest" / "checkpoints").glob("*.pt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(RANDOM.uniform(0, 0.3))
        for _ in range(100):  # the run may write a file between the listing of the folder and its removal
            with contextlib.suppress(OSError):
                shutil.rmtree((root / "latest").resolve())
                break
        code = wait(pid)
        lines = (folder / "stderr").read_text().splitlines()
        results[str(number)] = {"code": code, "output": lines, "traceback": any("Traceback" in text for text in lines)}
    return results


SCENARIOS = {f.__name__: f for f in (kinds, phases, small_disks, read_only, removed)}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
