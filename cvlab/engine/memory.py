"""How much memory is free, before something large is started."""

import contextlib
from pathlib import Path

import torch

CGROUPS = (  # limit and use, of version 2 and of version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how many bytes can still be had on a device; of the CPU within its container. None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            found.append(int((cgroup / limit).read_text()) - int((cgroup / used).read_text()))
    return max(0, min(found)) if found else None
