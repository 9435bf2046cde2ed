"""Free memory of a machine and of its container; the peak of a run."""

import sys

import pytest
import torch

from cvlab.engine import memory


def test_free_memory_of_machine_and_container(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   2000 kB\n")
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu, tmp_path, tmp_path / "none") == 2000 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert memory.free_bytes(cpu, tmp_path, tmp_path) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(cpu, tmp_path, tmp_path) == 2000 * 1024
    assert memory.free_bytes(cpu, tmp_path / "none", tmp_path / "none") is None


@pytest.mark.skipif(sys.platform != "linux", reason="the counter can be reset on Linux only")
def test_peak_memory_counts_from_its_start():
    torch.ones(400_000_000, dtype=torch.uint8)  # before: not counted
    peak = memory.PeakMemory()
    before = peak.megabytes()["peak_rss_mb"]
    tensor = torch.ones(200_000_000, dtype=torch.uint8)
    del tensor
    assert 190 < peak.megabytes()["peak_rss_mb"] - before < 390
    assert ("peak_cuda_mb" in peak.megabytes()) == torch.cuda.is_initialized()


def test_peak_memory_without_proc(tmp_path):
    assert memory.PeakMemory(tmp_path).megabytes()["peak_rss_mb"] > 50
