"""Device, precision and threads, and the state of the random generators."""

import contextlib
import ctypes
import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvlab.distributed import process_group
from cvlab.errors import DeviceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ComputeContext:
    """Where and how to compute: a device, a precision, a number of CPU threads."""

    device: torch.device
    precision: str  # float32 | bfloat16 (autocast, weights stay float32) | float64
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and weights: float64 if asked for, else float32."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a forward pass runs."""
        if self.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def as_dict(self) -> dict[str, Any]:
        """Return device, precision and threads for plans and records."""
        return {"device": str(self.device), "precision": self.precision, "threads": self.threads}

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be equal for two results to be bit-for-bit identical."""
        return self.as_dict() | {"torch": str(torch.__version__)}

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def select_device(device: str = "auto", precision: str = "auto", threads: int | None = None) -> ComputeContext:
    """Choose device, precision and threads; DeviceError where what was asked for is not there."""
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    hint = "use --device cpu, or --device auto to take what is there"
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device in ("auto", "cuda") and process_group.world().size > 1:
            chosen = torch.device("cuda", process_group.world().local_rank)
        if (chosen.index or 0) >= count:
            raise DeviceError(f"device {device} is not there: {count} CUDA devices", hint)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps is not there", hint)
    if precision == "auto":
        precision = "bfloat16" if fast_bfloat16(chosen) else "float32"
    return ComputeContext(chosen, precision, torch.get_num_threads())


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step.

    By default it gives each back to the kernel and has every page of the next one zeroed again: a quarter of the time
    of a small convolutional net on two cores. Elsewhere than on glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; without it bfloat16 is many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_rng_state() -> dict[str, Any]:
    """Return the states of all global generators, as tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the global generators back to a state of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
