"""Free memory, what a forward and a backward pass need of it, and the peak of a run."""

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

CGROUPS = (  # files with limit and use, of cgroup version 2 and version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
RESET_PEAK_RSS = "5"  # what to write into /proc/self/clear_refs, see proc(5)


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


class PeakMemory:
    """The largest memory that this process has used since this object was created.

    Linux counts resident memory from then on; elsewhere, and where the counter cannot be reset, from the start of the
    process. Memory of other processes, such as the other ranks of a run or the trials of a sweep, is not counted.

    Args:
        proc: Where the proc file system is mounted.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.proc = proc
        with contextlib.suppress(OSError):
            (proc / "self" / "clear_refs").write_text(RESET_PEAK_RSS)
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)

    def megabytes(self) -> dict[str, float]:
        """Return `peak_rss_mb` and, if this process has used CUDA, `peak_cuda_mb`, in 10^6 bytes.

        The latter is the memory of the tensors on the GPU that had most of them.
        """
        peaks: dict[str, int | None] = {"peak_rss_mb": self._peak_rss_bytes()}
        if torch.cuda.is_initialized():
            allocated = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
            peaks["peak_cuda_mb"] = max(allocated)
        return {name: round(count / 1e6, 1) for name, count in peaks.items() if count is not None}

    def _peak_rss_bytes(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            for line in (self.proc / "self" / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        try:
            import resource
        except ImportError:  # Windows
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def estimate_activation_bytes(
    forward: Callable[[Tensor], object],
    parameters: Iterable[nn.Parameter],
    height: int,
    width: int,
    device: torch.device,
    probe_px: int = 128,
) -> float:
    """Estimate the memory of a forward and a backward pass over an image: what autograd saves, and temporaries.

    Measured on a small image; what is saved grows with the number of pixels.

    Args:
        forward: from an image (3, H, W) in [0, 1] to anything that holds its graph.
        parameters: the model's; their memory is not counted.
        height: of the image in pixels.
        width: of the image in pixels.
        device: where the model is.
        probe_px: height and width of the small image.

    Returns:
        bytes.
    """
    saved: dict[int, int] = {}  # bytes of each storage

    def record(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.rand(3, probe_px, probe_px, device=device).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = forward(image)
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes = [size for address, size in saved.items() if address not in weights]
    del output  # only now: freed storage could be used again, and be counted once for two
    return (sum(sizes) + 3 * max(sizes)) * height * width / probe_px**2
