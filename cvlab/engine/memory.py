"""How much memory is free."""

import contextlib
from pathlib import Path

import torch

CGROUPS = (  # files with limit and use, of cgroup version 2 and version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the free memory of a device in bytes; None if it cannot be determined.

    Args:
        device: The device; the limit of a container counts for the CPU.
        proc: Where the proc file system is mounted.
        cgroup: Where the cgroup file system is mounted.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit_file, use_file in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" instead of a number: no limit
            limits.append(int((cgroup / limit_file).read_text()) - int((cgroup / use_file).read_text()))
    return max(0, min(limits)) if limits else None
