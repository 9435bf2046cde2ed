"""A long training run does not grow: memory, open files, threads."""

import itertools
import os
import statistics
import threading
import time
from pathlib import Path

import pytest

from tests import tiny

STEPS, SAMPLE = 20_000, 250


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_20000_steps_grow_nothing(tmp_path):
    seen = []

    def on_step(step):
        if step % SAMPLE == 0:
            open_files = len(os.listdir("/proc/self/fd"))
            seen.append((resident(), open_files, threading.active_count(), time.perf_counter()))

    config = tiny.settings(duration={"steps": STEPS}, log_every=10, save_seconds=0.2, eval_every=50)
    tiny.train(tmp_path / "long", config, on_step)
    memory, files, threads, times = zip(*seen[len(seen) // 4 :], strict=True)  # after caches are full
    assert len(seen) == STEPS // SAMPLE
    assert memory[-1] - memory[0] < 4_000_000, f"{(memory[-1] - memory[0]) / 1e6:.1f} MB more"
    assert max(files) - min(files) <= 1
    assert max(threads) == min(threads)
    spent = [later - earlier for earlier, later in itertools.pairwise(times)]
    slope = statistics.linear_regression(range(len(spent)), spent).slope * len(spent) / statistics.median(spent)
    print(f"memory {(memory[-1] - memory[0]) / 1e6:.2f} MB more, step time {slope:+.1%} over the run")
