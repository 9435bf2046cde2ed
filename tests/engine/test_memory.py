"""Free memory of a machine and of its container; the peak of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvlab.engine import memory

ROOT = Path(__file__).parents[2]


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
    """The allocation is in a new process: this process may have freed memory that it would reuse."""
    code = """
import torch
from cvlab.engine import memory
torch.ones(400_000_000, dtype=torch.uint8)  # before: not counted
peak = memory.PeakMemory()
before = peak.megabytes()["peak_rss_mb"]
torch.ones(200_000_000, dtype=torch.uint8)
print(peak.megabytes()["peak_rss_mb"] - before, "peak_cuda_mb" in peak.megabytes())
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    growth, has_cuda = output.split()
    assert 190 < float(growth) < 390
    assert has_cuda == "False"


def test_peak_memory_without_proc(tmp_path):
    assert memory.PeakMemory(tmp_path).megabytes()["peak_rss_mb"] > 50
