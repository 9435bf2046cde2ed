"""`cvlab bench processes`: the speedup of training in several processes, and the cost of exchanging gradients.

Model: a step of N processes takes t / N + 2 (N - 1) / N * gradient bytes / rate + (N - 1) * latency; t is the step
of one process, the rest is the cost of a ring all-reduce (Patarasuk and Yuan, 2009, "Bandwidth optimal all-reduce
algorithms").
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cvlab import console
from cvlab.distributed import process_group
from cvlab.errors import CvlabError
from cvlab.runs.find import LATEST, find_run
from cvlab.runs.records import read_summary

SIZES_PREDICTED = (2, 4, 8, 16, 32)
EXCHANGED_BYTES = (4_000, 40_000_000)  # of float32: a small one for the latency, a large one for the rate
REPEATED = 30


def run(config: str, overrides: list[str], processes: int, rounds: int, steps: int) -> dict[str, Any]:
    """Train in one and in several processes in turns, one thread each; return images/s and the model's constants."""
    with tempfile.TemporaryDirectory(prefix="cvlab-bench-") as folder:
        measured: dict[int, list[dict[str, Any]]] = {1: [], processes: []}
        for number in range(rounds):
            for size, metrics in measured.items():
                metrics.append(_train([config, *overrides], size, steps, Path(folder)))
                rate = metrics[-1]["images_per_second"]
                console.info(f"round {number + 1}, {size} processes: {rate:,.0f} images/s")
        latency, rate = _exchange_costs(processes, Path(folder))
    one, several = ([row["images_per_second"] for row in rows] for rows in measured.values())
    first = measured[1][0]
    step_seconds = statistics.median(row["train_seconds"] / row["steps"] for row in measured[1])
    gradient_bytes = 4 * int(first["parameters"])
    return {
        "what": f"{' '.join([config, *overrides])}, {steps} steps, one thread each, median of {rounds}",
        "processes": processes,
        "images_per_second": {1: statistics.median(one), processes: statistics.median(several)},
        "speedup": statistics.median(b / a for a, b in zip(one, several, strict=True)),
        "step_seconds": step_seconds,
        "gradient_bytes": gradient_bytes,
        "latency_seconds": latency,
        "bytes_per_second": rate,
        "predicted": {n: speedup(n, step_seconds, gradient_bytes, latency, rate) for n in SIZES_PREDICTED},
    }


def speedup(processes: int, step_seconds: float, gradient_bytes: int, latency: float, rate: float) -> float:
    """Return the speedup of a step with a fixed batch by the model above, with one core per process."""
    exchange = 2 * (processes - 1) / processes * gradient_bytes / rate + (processes - 1) * latency
    return step_seconds / (step_seconds / processes + exchange)


def _train(arguments: list[str], processes: int, steps: int, folder: Path) -> dict[str, Any]:
    changed = [f"duration={{steps: {steps}}}", "eval_every=1000000", "expect=[]", "expect_fallback=[]", "threads=1"]
    changed += ["evaluate_test=false", "save_seconds=1000000"]
    root = folder / f"{processes}"
    command = [sys.executable, "-m", "cvlab", "train", *arguments, *changed, "--runs-dir", str(root), "--json", "-q"]
    _run_command([*command, f"--nproc={processes}"])
    metrics: dict[str, Any] = read_summary(find_run(LATEST, root))["metrics"]
    return metrics


def _run_command(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error = CvlabError((done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: "))
        error.code = done.returncode
        raise error
    return done.stdout


def _exchange_costs(processes: int, folder: Path) -> tuple[float, float]:
    """Return the latency in seconds and the rate in bytes/s of an exchange between processes of this machine."""
    from cvlab.distributed import launcher

    file = folder / "exchanged.json"
    launcher.start(("-m", "cvlab.bench.processes", str(file)), processes)
    small, large = json.loads(file.read_text())
    ring = 2 * (processes - 1) / processes * EXCHANGED_BYTES[1]
    return small / max(processes - 1, 1), ring / max(large - small, 1e-9)


def _measure_exchange(file: Path) -> None:
    """Run as one of the processes: all-reduce tensors; process 0 writes the median seconds of each size."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    with process_group.init_process_group():
        seconds = []
        for count in EXCHANGED_BYTES:
            tensor = torch.zeros(count // 4)
            times = []
            for _ in range(REPEATED):
                dist.barrier()
                start = time.perf_counter()
                dist.all_reduce(tensor)
                times.append(time.perf_counter() - start)
            seconds.append(statistics.median(times))
        if process_group.is_main():
            file.write_text(json.dumps(seconds))


if __name__ == "__main__":
    _measure_exchange(Path(sys.argv[1]))
