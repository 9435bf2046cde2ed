"""Memory, open files and threads do not grow in a long training run."""

import itertools
import os
import statistics
import threading
import time
from pathlib import Path

import pytest

from tests import tiny

STEPS, SAMPLE = 20_000, 250


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_resources_do_not_grow_in_20000_steps(tmp_path):
    samples = []

    def on_step(step):
        if step % SAMPLE == 0:
            open_files = len(os.listdir("/proc/self/fd"))
            samples.append((resident_bytes(), open_files, threading.active_count(), time.perf_counter()))

    config = tiny.settings(duration={"steps": STEPS}, log_every=10, save_seconds=0.2, eval_every=50)
    tiny.train(tmp_path / "long", config, on_step)
    memory, files, threads, times = zip(*samples[len(samples) // 4 :], strict=True)  # after caches are full
    assert len(samples) == STEPS // SAMPLE
    assert memory[-1] - memory[0] < 4_000_000, f"{(memory[-1] - memory[0]) / 1e6:.1f} MB more"
    assert max(files) - min(files) <= 1
    assert max(threads) == min(threads)
    durations = [later - earlier for earlier, later in itertools.pairwise(times)]
    slope = (
        statistics.linear_regression(range(len(durations)), durations).slope
        * len(durations)
        / statistics.median(durations)
    )
    print(f"memory {(memory[-1] - memory[0]) / 1e6:.2f} MB more, step time {slope:+.1%} over the run")
