"""Measure the rates of this machine: matrix products, convolutions, copies."""

import contextlib
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvlab.bench.harness import FORWARD_AND_BACKWARD, alternate, describe, forward_backward_loop
from cvlab.engine import device as engine_device
from cvlab.engine.device import ComputeContext
from cvlab.runs.environment import environment

MATRIX = 2048
COPIED_FLOATS = 2**25  # 128 MiB, larger than any cache
CONVOLUTION = (128, 64, 128, 16)  # batch, channels in and out, pixels: a middle layer of the cifar_60s models


def matmul_loop(ctx: ComputeContext, dtype: torch.dtype) -> Callable[[], None]:
    """Return a loop that multiplies two square matrices."""
    a, b = (torch.randn(MATRIX, MATRIX, device=ctx.device).to(dtype) for _ in range(2))

    def loop() -> None:
        torch.mm(a, b)
        ctx.synchronize()

    return loop


def convolution_loop(ctx: ComputeContext, dtype: torch.dtype) -> Callable[[], None]:
    """Return a loop that runs one 3x3 convolution."""
    n, channels_in, channels_out, size = CONVOLUTION
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, device=ctx.device, dtype=dtype)
    layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(n, channels_in, size, size, device=ctx.device).to(dtype, memory_format=torch.channels_last)
    return forward_backward_loop(layer, x, ctx)


def copy_loop(ctx: ComputeContext) -> Callable[[], None]:
    """Return a loop that copies a large tensor."""
    source, target = (torch.zeros(COPIED_FLOATS, device=ctx.device) for _ in range(2))

    def loop() -> None:
        target.copy_(source)
        ctx.synchronize()

    return loop


def machine(rounds: int, device: str) -> dict[str, Any]:
    """Measure the rates that bound training: GFLOP/s of matrix products and convolutions, GB/s of copies."""
    ctx = engine_device.select_device(device, scales_loss=True)
    about = environment()
    names = dict.fromkeys(("float32", ctx.precision))
    loops = {f"product/{name}": matmul_loop(ctx, engine_device.DTYPES[name]) for name in names}
    loops |= {f"convolution/{name}": convolution_loop(ctx, engine_device.DTYPES[name]) for name in names}
    seconds = alternate({**loops, "copy": copy_loop(ctx)}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    n, channels_in, channels_out, size = CONVOLUTION
    convolution = FORWARD_AND_BACKWARD * 2 * n * channels_in * channels_out * 9 * size**2
    return {
        "about": describe(ctx, ctx.precision, rounds),
        "host": about["host"],
        "cpu": f"{_cpu_name()}, {about['cpu_count']} cores, {about['cpu_capability']}",
        "gpu": torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else None,
        "threads": ctx.threads,
        "torch": about["torch"],
        "product_gflops": {name: 2 * MATRIX**3 / medians[f"product/{name}"] / 1e9 for name in names},
        "convolution_gflops": {name: convolution / medians[f"convolution/{name}"] / 1e9 for name in names},
        "copy_gb_per_second": 2 * 4 * COPIED_FLOATS / medians["copy"] / 1e9,
    }


def product_gflops(rounds: int, device: str, precision: str) -> float:
    """Measure the rate of matrix products in a precision, in GFLOP/s."""
    ctx = engine_device.select_device(device, precision)
    seconds = alternate({precision: matmul_loop(ctx, engine_device.DTYPES[precision])}, rounds)[precision]
    return 2 * MATRIX**3 / statistics.median(seconds) / 1e9


def _cpu_name() -> str:
    """Return the name of the processor's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
