"""Measurements: alternating, in one process, medians and ratios, because machines are shared and noisy."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cvlab.engine.device import ComputeContext


def alternate(loops: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run each loop once to warm it up, then once per round, in turn; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronized(ctx: ComputeContext, work: Callable[[], object]) -> Callable[[], None]:
    """Return a loop that ends when what it has asked the device for is done."""

    def loop() -> None:
        work()
        ctx.synchronize()

    return loop


def about(ctx: ComputeContext, precision: str, rounds: int) -> str:
    """Say what was measured on."""
    return f"{ctx.device}, {precision}, {ctx.threads} threads, torch {torch.__version__}, n={rounds}"


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of paired measurements."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


pass  # REMOVED IMPORT


FORWARD_AND_BACKWARD = 3  # a backward pass is two products of the size of the forward one


def forward_backward_loop(layer: nn.Module, x: Tensor, ctx: ComputeContext) -> Callable[[], None]:
    """Make one forward and backward pass through a layer, from random upstream gradients."""
    dout = torch.randn_like(layer(x))

    def loop() -> None:
        layer(x.detach().requires_grad_()).backward(dout)
        ctx.synchronize()

    return loop
