"""Free memory of a machine and of its container."""

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
