"""Free memory, what a forward and a backward pass need of it, and the peak of a run."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from cvlab import portability


def free_bytes(device: torch.device, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the free memory of a device in bytes; None if it cannot be determined.

    Args:
        device: The device; the limit of a container counts for the CPU.
        proc: Where the proc file system is mounted.
        cgroup: Where the cgroup file system is mounted.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # that torch keeps for reuse
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return portability.free_memory_bytes(proc, cgroup)


class PeakMemory:
    """The largest memory that this process has used since this object was created.

    Linux counts resident memory from then on; elsewhere, and where the counter cannot be reset, from the start of the
    process. Memory of other processes, such as the other ranks of a run or the trials of a sweep, is not counted.

    Args:
        proc: Where the proc file system is mounted.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.proc = proc
        portability.reset_peak_memory(proc)
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)

    def megabytes(self) -> dict[str, float]:
        """Return `peak_rss_mb` and, if this process has used CUDA, `peak_cuda_mb`, in 10^6 bytes.

        The latter is the memory of the tensors on the GPU that had most of them.
        """
        peaks: dict[str, int | None] = {"peak_rss_mb": portability.peak_memory_bytes(self.proc)}
        if torch.cuda.is_initialized():
            allocated = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
            peaks["peak_cuda_mb"] = max(allocated)
        return {name: round(count / 1e6, 1) for name, count in peaks.items() if count is not None}


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
        forward: Maps an image (3, H, W) in [0, 1] to anything that holds its graph.
        parameters: The model's; their memory is not counted.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        device: Where the model is.
        probe_px: Height and width of the small image.

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
