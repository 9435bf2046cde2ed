"""Device, precision and number of threads, and the state of the random number generators."""

import contextlib
import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvlab import portability
from cvlab.distributed import process_group
from cvlab.errors import DeviceError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
CUDA_READ_EVERY = 20  # steps
TENSOR_CORES = (7, 0)  # compute capability of the first GPUs that multiply float16 in hardware


@dataclass(frozen=True)
class ComputeContext:
    """Where and how to compute.

    Attributes:
        device: The device.
        precision: float32, bfloat16 or float16 (autocast; weights stay float32), or float64.
        threads: Number of CPU threads.
        deterministic: Whether runs on CUDA are bit-for-bit identical; otherwise cuDNN measures which convolution
            algorithm is fastest.
        read_every: Steps between two reads of the losses by the training loop. On CUDA every read waits for the device.
    """

    device: torch.device
    precision: str
    threads: int
    deterministic: bool = True
    read_every: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and weights: float64 for precision float64, else float32."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context manager for a forward pass."""
        if self.precision not in ("bfloat16", "float16"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def make_scaler(self) -> torch.amp.GradScaler | None:
        """Return what scales the loss so that gradients do not underflow in float16; None for other precisions."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "float16" else None

    def as_dict(self) -> dict[str, Any]:
        """Return device, precision and threads for plans and records, and how CUDA computes."""
        about = {"device": str(self.device), "precision": self.precision, "threads": self.threads}
        on_cuda = {"tf32": False, "deterministic": self.deterministic} if self.device.type == "cuda" else {}
        return about | on_cuda

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be equal for two results to be bit-for-bit identical."""
        name = {"gpu": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return self.as_dict() | {"torch": str(torch.__version__)} | name

    def synchronize(self) -> None:
        """Wait until the device has finished, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def select_device(
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    *,
    scales_loss: bool = False,
    deterministic: bool = True,
) -> ComputeContext:
    """Choose device, precision and number of threads.

    Args:
        device: `cpu`, `cuda`, `cuda:N`, `mps` or `auto`; in a distributed run, cuda and auto are the GPU of this rank.
        precision: float32, bfloat16, float16, float64, or auto: bfloat16 if the device has hardware for it, else
            float16 if a GPU has hardware for that and the caller scales its loss, else float32.
        threads: Number of CPU threads; None for torch's default.
        scales_loss: Whether the caller can train in float16, see `ComputeContext.make_scaler`.
        deterministic: See `ComputeContext`.

    Raises:
        DeviceError: The device does not exist.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    selected = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    hint = "use --device cpu, or --device auto for the best available one"
    if selected.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device in ("auto", "cuda") and process_group.world().size > 1:
            selected = torch.device("cuda", process_group.world().local_rank if count > 1 else 0)  # 1: each has its own
        if (selected.index or 0) >= count:
            raise DeviceError(f"device {device} is not available: {count} CUDA devices", hint)
    if selected.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps is not available", hint)
    if precision == "auto":
        precision = _fast_precision(selected, scales_loss)
    if selected.type == "cuda":
        _configure_cuda(deterministic)
    read_every = CUDA_READ_EVERY if selected.type == "cuda" else 1
    return ComputeContext(selected, precision, torch.get_num_threads(), deterministic, read_every)


def _fast_precision(device: torch.device, scales_loss: bool) -> str:
    """Return the precision that a device is fast in."""
    if fast_bfloat16(device):
        return "bfloat16"
    has_float16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return "float16" if scales_loss and has_float16 else "float32"


def _configure_cuda(deterministic: bool) -> None:
    """Choose how CUDA computes: float32 without TF32, so that it agrees with the CPU; cuDNN's algorithms.

    By default torch rounds the inputs of float32 convolutions to the 10 bits of TF32 and those of matrix products not.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # what is fastest in one run need not be in the next


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step.

    By default it returns each to the kernel, which zeroes every page of the next one again: a quarter of the time of a
    small convolutional network on two cores. Without glibc nothing changes.
    """
    portability.keep_freed_memory()


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware; else bfloat16 is many times slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; to CUDA it is copied from pinned memory, without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upcast(logits: torch.Tensor) -> torch.Tensor:
    """Return logits of 16 bits as float32, precise enough for a softmax."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def seed_everything(seed: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_rng_state() -> dict[str, Any]:
    """Return the states of all global generators as tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the global generators to a state that `get_rng_state` returned."""
    torch.set_rng_state(state["torch"])
    for index, generator_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator_state, index)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
