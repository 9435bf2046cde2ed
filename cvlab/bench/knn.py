"""`cvlab bench knn`: Euclidean distances with two, one and no loops, against `torch.cdist`."""

import functools
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvlab.bench.harness import alternate, describe, median_ratio, synchronized
from cvlab.engine import device as engine_device
from cvlab.ops import nearest_neighbors

if TYPE_CHECKING:
    from collections.abc import Callable

DIMENSIONS = 3 * 32 * 32  # of an image of CIFAR-10
REFERENCE = "torch.cdist"


def distances(rounds: int, num_test: int, num_train: int, device: str) -> dict[str, Any]:
    """Measure the distances between noise of the size of CIFAR-10's images.

    Returns:
        `loops`: of each way the median seconds, its time relative to that without loops, and the largest difference
        of a distance from that of `torch.cdist`.
    """
    ctx = engine_device.select_device(device, "float32")
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randint(0, 256, (count, DIMENSIONS), generator=generator).to(ctx.device, ctx.dtype)
        for count in (num_test, num_train)
    )
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "two loops": nearest_neighbors.distances_two_loops,
        "one loop": nearest_neighbors.distances_one_loop,
        "no loops": nearest_neighbors.distances_no_loops,
        REFERENCE: torch.cdist,
    }
    expected = torch.cdist(x.double(), y.double())
    loops = {name: synchronized(ctx, functools.partial(way, x, y)) for name, way in ways.items()}
    seconds = alternate(loops, rounds)
    rows = [
        {
            "loop": name,
            "seconds": statistics.median(seconds[name]),
            "against_no_loops": median_ratio(seconds[name], seconds["no loops"]),
            "largest_error": (way(x, y) - expected).abs().max().item(),
        }
        for name, way in ways.items()
    ]
    what = f"{num_test} x {num_train} distances of {DIMENSIONS} numbers, {describe(ctx, ctx.precision, rounds)}"
    return {"ok": True, "what": what, "loops": rows}
