"""Measurements: alternating, in one process, medians and ratios, because machines are shared and noisy."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvlab.engine.device import ComputeContext
from cvlab.reports import tables

FORWARD_AND_BACKWARD = 3  # a backward pass is two products of the size of the forward one


def alternate(loops: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run each loop once to warm it up, then all loops in turn, once per round.

    Args:
        loops: What to measure, by name.
        rounds: Number of measurements of each loop.

    Returns:
        The seconds of every measurement, by the loop's name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for _ in range(rounds):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronized(ctx: ComputeContext, work: Callable[[], object]) -> Callable[[], None]:
    """Return a loop that calls `work` and waits until the device has finished."""

    def loop() -> None:
        work()
        ctx.synchronize()

    return loop


def describe(ctx: ComputeContext, precision: str, rounds: int) -> str:
    """Return a description of the device and the measurement."""
    return f"{ctx.device}, {precision}, {ctx.threads} threads, torch {torch.__version__}, n={rounds}"


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of two series of paired measurements."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def forward_backward_loop(layer: nn.Module, x: Tensor, ctx: ComputeContext) -> Callable[[], None]:
    """Make one forward and backward pass through a layer, from random upstream gradients."""
    dout = torch.randn_like(layer(x))

    def loop() -> None:
        layer(x.detach().requires_grad_()).backward(dout)
        ctx.synchronize()

    return loop


def argument_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of the options that every script in `benchmarks/` has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each, taken in turns")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def print_result(
    result: Mapping[str, Any], as_json: bool, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Print a measurement as a JSON document or as a table."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        tables.table(result["what"], columns, rows)
