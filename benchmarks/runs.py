"""Time `cvlab runs` on a folder of thousands of runs: without a cache, with one, and with a query.

    python benchmarks/runs.py [--count 5000]

The runs are generated from a shipped configuration and have the records of a training run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from cvlab.config import loading
from cvlab.runs import index

QUERY = "status=done val_accuracy>0.7 optimizer.lr>=1e-3 age<100w"


def generate(root: Path, count: int) -> None:
    """Write `count` run directories below `root`, all an hour old."""
    config = loading.load("cifar_bn").config
    text, generator = config.to_yaml(), random.Random(0)
    names = [f"{split}_{metric}" for split in ("train", "val", "best_val", "test") for metric in ("loss", "accuracy")]
    info = {name: {"unit": "", "better": "higher" if name.endswith("accuracy") else "lower"} for name in names}
    mtime = time.time() - 3600
    for number in range(count):
        path = root / f"20260101-{number // 3600:02d}{number // 60 % 60:02d}{number % 60:02d}-cifar_bn-{number:04x}"
        path.mkdir(parents=True)
        changed = yaml.safe_load(text) | {"seed": number}
        changed["optimizer"]["lr"] = generator.choice([1e-4, 1e-3, 1e-2])
        status = {"status": "done", "updated": "2026-01-01T00:00:00+00:00", "experiment": "classify", "data": "cifar10"}
        metrics = {name: generator.random() for name in names}
        summary = {
            "experiment": "classify",
            "name": "cifar_bn",
            "metrics": metrics,
            "metric_info": info,
            "seconds": 9.0,
        }
        for name, content in (
            ("config.yaml", yaml.safe_dump(changed, sort_keys=False, default_flow_style=None)),
            ("status.json", json.dumps(status)),
            ("summary.json", json.dumps(summary)),
        ):
            (path / name).write_text(content)
            os.utime(path / name, (mtime, mtime))


def seconds_of(root: Path, *arguments: str) -> float:
    """Return the seconds of a command, including the start of Python."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cvlab", "runs", "--runs-dir", str(root), *arguments], check=True, stdout=subprocess.PIPE
    )
    return time.perf_counter() - start


def main() -> None:
    """Generate runs and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="number of runs")
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "runs")
        generate(root, count)
        query = (QUERY, "--sort", "val_accuracy", "--limit", "20")
        for label, arguments in (
            ("list, no cache", ()),
            ("list, cached", ()),
            ("query on metrics and settings, settings not cached", query),
            ("query on metrics and settings, cached", query),
            ("query, cached, again", query),
        ):
            print(f"{label:52} {seconds_of(root, *arguments):6.2f} s")
        print(f"{'cache':52} {(root / index.FILE).stat().st_size / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()
