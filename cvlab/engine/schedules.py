"""Learning-rate schedules: the factor of the learning rate as a pure function of progress between 0 and 1."""

import math
from typing import Annotated

from annotated_types import Gt, Lt

from cvlab.config.schema import Registry
from cvlab.engine.optimizers import Small

SCHEDULES = Registry(
    "schedule",
    {
        name: f"cvlab.engine.schedules:{name}"
        for name in ("constant", "linear", "cosine", "triangle", "bend", "multistep")
    },
    injected=frozenset({"progress"}),
)


def constant(progress: float) -> float:  # noqa: ARG001 - every schedule takes it
    """Keep the learning rate."""
    return 1.0


def linear(progress: float, final: Small = 0.0) -> float:
    """Decrease linearly from 1 to `final`."""
    return 1.0 + (final - 1.0) * progress


def cosine(progress: float, final: Small = 0.0) -> float:
    """Decrease from 1 to `final` along half a cosine (Loshchilov and Hutter, 2017, equation 5)."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def triangle(
    progress: float, peak: Annotated[float, Gt(0), Lt(1)] = 0.2, first: Small = 0.0, final: Small = 0.0
) -> float:
    """Increase linearly from `first` to 1 at `peak`, then decrease to `final`."""
    if progress < peak:
        return first + (1.0 - first) * progress / peak
    return final + (1.0 - final) * (1.0 - progress) / (1.0 - peak)


def bend(progress: float, at: Annotated[float, Gt(0), Lt(1)] = 0.5, factor: Small = 0.1) -> float:
    """Decrease linearly from 1 to `factor` at progress `at`, then to 0; for runs whose loss changes there."""
    if progress < at:
        return 1.0 + (factor - 1.0) * progress / at
    return factor * (1.0 - progress) / (1.0 - at)


def multistep(progress: float, at: tuple[Small, ...] = (0.6, 0.8), factor: Small = 0.1) -> float:
    """Multiply by `factor` at each progress listed in `at`."""
    return math.prod(factor for share in at if progress >= share)


def warmed_up(factor: float, progress: float, warmup: float) -> float:
    """Scale a factor by a linear increase from 0 to 1 while progress is below `warmup`."""
    return factor * min(1.0, progress / warmup) if warmup > 0 else factor
