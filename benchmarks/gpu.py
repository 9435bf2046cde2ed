"""Run all benchmarks that need a GPU within a time limit and without network; write one JSON.

    python benchmarks/gpu.py --out gpu.json                        # at most 8 minutes
    python benchmarks/gpu.py --packs PACKS --out gpu.json          # unpack CIFAR-10 first, see cifar_pack.py
    python benchmarks/gpu.py --tiny --device cpu --out gpu.json    # a smoke test for any machine

Each part runs in a separate process, so that a part that fails or hangs does not stop the others. A part stops when
its time or the total time is used up; the JSON has the rows measured until then and the reason for missing ones.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cifar_pack, photos
from cvlab import portability
from cvlab.bench import harness, training
from cvlab.data import photo_paths
from cvlab.data import photos as photo_files
from cvlab.engine import device as engine_device
from cvlab.engine import loop, optimizers
from cvlab.experiments.detection import inference
from cvlab.experiments.detection.models import base as detector_base
from cvlab.experiments.detection.models import detector as detector_model
from cvlab.experiments.detection.setup import make_loss_fn
from cvlab.runs.environment import environment
from cvlab.storage.cache import data_root

ROOT = Path(__file__).parent.parent
RESERVED_SECONDS = 10.0  # for ending a part and writing the JSON
SECONDS_TO_REPORT = 5.0  # for the report of a part that is stopped
MIN_SECONDS = 5.0  # a part with less time is not started
FAST = ("deterministic=false",)
TINY = ("model.widths=[4,8]", "model.depth=1", "data.num_train=200", "batch_size=100", "duration={epochs: 1}")
METRICS = ("test_accuracy_tta", "test_accuracy", "train_seconds", "images_per_second", "steps")
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Arguments of a part."""

    device: str
    tiny: bool
    deadline: float  # in terms of `time.monotonic`, which is the same in all processes

    def seconds_left(self) -> float:
        """Return the seconds until the part has to end."""
        return self.deadline - time.monotonic()


def train_once(options: Options, name: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train a shipped configuration; return accuracies and times from its JSON."""
    from cvlab.cli import main

    out = io.StringIO()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        command = ["train", name, f"seed={seed}", f"device={options.device}", *overrides, "--runs-dir", folder]
        code = main.run_command_line([*command, "--json", "-q"])
    document = json.loads(out.getvalue())
    row = {"config": name, "seed": seed, "overrides": list(overrides), "exit_code": code}
    if "metrics" not in document:
        return row | {"error": document.get("error")}
    row |= {key: document["metrics"][key] for key in METRICS if key in document["metrics"]}
    return row | {"wall_seconds": time.perf_counter() - start}


def train_many(options: Options, name: str, variants: Sequence[tuple[int, Sequence[str]]]) -> Rows:
    """Train (runs, overrides) of a configuration with seeds from 0; skip runs that would not end in time."""
    longest = 0.0
    for runs, overrides in variants:
        for seed in range(1 if options.tiny else runs):
            if options.seconds_left() < 1.1 * longest:
                yield {"config": name, "seed": seed, "overrides": list(overrides), "skipped": "no time is left"}
                continue
            start = time.perf_counter()
            yield train_once(options, name, seed, (*overrides, *(TINY if options.tiny else ())))
            longest = max(longest, time.perf_counter() - start)


def cifar_94(options: Options) -> Rows:
    """Yield ten runs with the fastest algorithms, then three as shipped and three compiled."""
    compiled = () if options.tiny else ((3, (*FAST, "compile=true")),)
    return train_many(options, "cifar_94", ((10, FAST), (3, ()), *compiled))


def cifar_96(options: Options) -> Rows:
    """Yield three runs with the fastest algorithms."""
    return train_many(options, "cifar_96", ((3, FAST),))


def cifar_60s(options: Options) -> Rows:
    """Yield three runs of a minute each, of the largest profile."""
    profile = "small" if options.tiny else "large"
    overrides = (f"profile={profile}", *FAST)
    if not options.tiny:
        yield from train_many(options, "cifar_60s", ((3, overrides),))
        return
    sizes = ("model.widths=[4,8]", "data.num_train=500", "batch_size=50", "duration={seconds: 2}")
    yield train_once(options, "cifar_60s", 0, (*overrides, *sizes))


def engine(options: Options) -> Rows:
    """Yield the engine's step against a bare loop, for the shapes of several configurations."""
    rounds, steps = (1, 1) if options.tiny else (5, 40)
    for name in ("quickstart",) if options.tiny else ("cifar_vgg_half_60s", "cifar_94", "cifar_96"):
        result = training.engine(rounds, steps, options.device, name)
        yield {"config": name, **result}


def yolo(options: Options) -> Rows:
    """Yield a training step of yolo_fpn on maps of noise, and one photo from pixels to boxes."""
    ctx = engine_device.select_device(options.device, scales_loss=True)
    size, batch, steps = (128, 2, 2) if options.tiny else (416, 32, 20)
    yield {
        "what": "yolo_fpn training step",
        "size_px": size,
        "batch_size": batch,
        **_yolo_step(ctx, size, batch, steps),
    }
    detector = inference.load_detector("yolo", None, ctx)
    photo = photo_files.load(photo_paths.find_images([photo_paths.SAMPLE])[0])
    rounds = 2 if options.tiny else 15
    predict = harness.synchronized(ctx, lambda: detector.predict([photo], 0.25, 0.5))
    measured = harness.alternate({"photo": predict}, rounds)
    yield {"what": "yolo, one photo", "seconds": statistics.median(measured["photo"]), "n": rounds}


def _yolo_step(ctx: engine_device.ComputeContext, size: int, batch: int, steps: int) -> dict[str, Any]:
    """Return the median seconds of a training step on random maps and boxes."""
    torch.manual_seed(0)
    metadata = detector_model.DetectorMetadata("yolo_fpn", {}, tuple("abcdefgh"), size)
    detector = detector_model.build(metadata, ctx.device)
    with torch.no_grad():
        by_name = detector.features.batch(torch.rand(batch, 3, size, size, device=ctx.device))
    maps = [by_name[name].float() for name in detector.features.names]
    corners = [torch.rand(4, 2) * size / 2 for _ in range(batch)]
    boxes = [torch.cat([corner, corner + size / 4], 1) for corner in corners]
    targets = detector_base.collate_targets(boxes, [torch.randint(0, 8, (4,)) for _ in range(batch)])
    optimizer = optimizers.build_optimizer("adamw", detector.head, {})
    state = loop.TrainState(detector.head, optimizer, 0.99, ctx.make_scaler())
    training_steps = loop.fit(
        state,
        make_loss_fn(size),
        lambda _: (maps, targets.to(ctx.device)),
        lr_factor=lambda _: 1.0,
        ctx=ctx,
    )

    def take_steps() -> None:
        for _ in range(steps):
            next(training_steps)

    seconds = harness.alternate({"step": harness.synchronized(ctx, take_steps)}, 3)["step"]
    return {"seconds": statistics.median(seconds) / steps, "n": 3 * steps, "precision": ctx.precision}


def attack(options: Options) -> Rows:
    """Yield attack and saliency steps against bare loops, and PGD against torchattacks if it is installed."""
    yield photos.run(1 if options.tiny else 7, options.device, 1 if options.tiny else 8)
    if importlib.util.find_spec("torchattacks") is None:
        yield {"what": "torchattacks", "skipped": "torchattacks is not installed"}
        return
    ctx = engine_device.select_device(options.device, "float32")
    model = photos.bare_model(ctx.device)
    method = importlib.import_module("torchattacks").PGD(model, steps=photos.STEPS)
    images = torch.rand(1 if options.tiny else 8, 3, photos.SIZE_PX, photos.SIZE_PX, device=ctx.device)
    labels = torch.full((len(images),), photos.TARGET, device=ctx.device)
    measured = harness.alternate({"pgd": harness.synchronized(ctx, lambda: method(images, labels))}, 3)
    yield {"what": "torchattacks", "seconds_per_step": statistics.median(measured["pgd"]) / photos.STEPS}


def tests(options: Options) -> Rows:
    """Yield the outcomes of the tests marked `cuda`, and the end of the output of pytest."""
    yield run_pytest(options, ["-m", "cuda", "tests/engine/test_cuda.py"])


def suite(options: Options) -> Rows:
    """Yield the outcomes of the fast tests, run on the GPU; 16 cores take four minutes."""
    processes = max(1, min(15, (os.cpu_count() or 1) - 1)) if importlib.util.find_spec("xdist") else 0
    parallel = ["-n", str(processes), "--dist", "worksteal"] if processes else []
    paths = ["tests/ops"] if options.tiny else []
    yield run_pytest(options, [*parallel, "-m", "not slow and not faults and not browser", *paths])


def run_pytest(options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the number of outcomes, the failed tests, and the end of the output, also if pytest is stopped."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-rfE", "--tb=short", "--show-capture=no"]
    command += ["-W", "default", "-p", "no:benchmark", "-p", "no:cacheprovider", *arguments]
    environment = {
        key: value for key, value in os.environ.items() if key != "CVLAB_DATA"
    }  # tests on real data are skipped
    with tempfile.TemporaryFile() as file:  # not a pipe, which processes started by pytest could keep open
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(max(1.0, options.seconds_left() - SECONDS_TO_REPORT))
        except subprocess.TimeoutExpired:
            portability.kill_session(process)
            code = -1
        file.seek(0)
        output = file.read().decode(errors="replace")
    outcomes = ("PASSED", "FAILED", "SKIPPED", "ERROR")
    lines = [line for line in output.splitlines() if "::" in line and "%]" in line]
    counts = {outcome: sum(f" {outcome}" in line for line in lines) for outcome in outcomes}
    failed = [line for line in lines if " FAILED" in line or " ERROR" in line]
    return {"exit_code": code, "outcomes": counts, "failed": failed, "output_end": output[-20_000:]}


@dataclass(frozen=True)
class Part:
    """A part and its time limit in seconds."""

    measure: Callable[[Options], Rows]
    seconds: float


PARTS: Mapping[str, Part] = {
    "cifar_94": Part(cifar_94, 130),
    "engine": Part(engine, 40),
    "tests": Part(tests, 100),
    "cifar_96": Part(cifar_96, 90),
    "yolo": Part(yolo, 30),
    "attack": Part(attack, 40),
    "cifar_60s": Part(cifar_60s, 240),
    "suite": Part(suite, 400),
}
DEFAULT_PARTS = tuple(name for name in PARTS if name != "suite")


def run_part(name: str, options: Options, rows_path: Path) -> None:
    """Run a part in this process; append each of its rows to a file as a line of JSON."""
    with rows_path.open("a") as file:
        for row in PARTS[name].measure(options):
            file.write(json.dumps(row) + "\n")
            file.flush()


def start_part(name: str, seconds: float, device: str, tiny: bool) -> dict[str, Any]:
    """Run a part in a separate process with a time limit; return its rows and its problem, if any."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows_path = Path(folder) / "rows.jsonl"
        rows_path.touch()
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--rows", str(rows_path)]
        command += ["--device", device, "--deadline", str(start + seconds), *(["--tiny"] if tiny else [])]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        problem = None
        try:
            process = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": paths, "CVLAB_OFFLINE": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=seconds,
                check=False,
            )
            if process.returncode:
                problem = {"exit_code": process.returncode, "stderr_end": process.stderr[-3000:]}
        except subprocess.TimeoutExpired:
            problem = {"stopped": f"its {seconds:.0f} s were used"}
        rows = [json.loads(line) for line in rows_path.read_text().splitlines() if line.endswith("}")]
    return {"seconds": time.monotonic() - start, "rows": rows, "problem": problem}


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, standard deviation and median of training runs with the same configuration and overrides."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "train_seconds" in row:
            groups.setdefault((row["config"], *row["overrides"]), []).append(row)
    summaries = []
    for (config, *overrides), group in groups.items():
        summary: dict[str, Any] = {"config": config, "overrides": overrides, "n": len(group)}
        for key in ("test_accuracy_tta", "train_seconds"):
            values = [row[key] for row in group if key in row]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                numbers = {"mean": statistics.fmean(values), "sd": spread, "median": statistics.median(values)}
                summary[key] = numbers
        summaries.append(summary)
    return summaries


def run(minutes: float, device: str, tiny: bool, out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Run the parts in turn; write the JSON after each of them."""
    end = time.monotonic() + 60 * minutes - RESERVED_SECONDS
    ctx = engine_device.select_device(device, scales_loss=True)
    result: dict[str, Any] = {"ok": True, "environment": environment(), "compute": ctx.as_dict(), "tiny": tiny}
    result["parts"] = {}
    for name in names:
        seconds = min(PARTS[name].seconds, end - time.monotonic())
        if seconds < MIN_SECONDS:
            part: dict[str, Any] = {"skipped": f"{max(0.0, seconds):.0f} s are left of {minutes:g} minutes"}
        else:
            part = start_part(name, seconds, device, tiny)
            part["summary"] = summarize(part["rows"])
        result["parts"][name] = part
        result["ok"] = result["ok"] and not part.get("problem") and "skipped" not in part
        out.write_text(json.dumps(result, indent=1))
        print(f"{name}: {json.dumps({key: value for key, value in part.items() if key != 'rows'})}", flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all parts, or a single part in the process that `start_part` has started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON to write")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, unpacking included")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--packs", type=Path, help="folder of the two parts of CIFAR-10, to unpack into CVLAB_DATA")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, for a smoke test")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(PARTS), default=DEFAULT_PARTS, help="parts; suite is not a default"
    )
    for name in ("--part", "--rows", "--deadline"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        run_part(options.part, Options(options.device, options.tiny, float(options.deadline)), Path(options.rows))
        return
    start = time.monotonic()
    if options.packs:
        cifar_pack.unpack(options.packs, data_root())
    minutes = options.minutes - (time.monotonic() - start) / 60
    run(minutes, options.device, options.tiny, options.out, options.only)


if __name__ == "__main__":
    main()
