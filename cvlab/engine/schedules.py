"""Learning-rate schedules: the factor of the learning rate as a pure function of progress between 0 and 1."""

import math
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from cvlab.config.schema import PositiveFloat, PositiveInt, Registry
from cvlab.engine.optimizers import Small

Inside = Annotated[float, Gt(0), Lt(1)]  # a progress or a factor strictly between 0 and 1
FinalFactor = Annotated[float, Gt(0), Le(1)]

_NAMES = (
    *("constant", "linear", "cosine", "cosine_restarts", "polynomial", "exponential", "triangle", "one_cycle"),
    *("bend", "step", "multistep", "plateau"),
)
PLATEAU = "plateau"
SCHEDULES = Registry(
    "schedule",
    {name: f"cvlab.engine.schedules:{name}" for name in _NAMES},
    injected=frozenset({"progress", "num_reductions"}),
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


def cosine_restarts(
    progress: float,
    cycles: Annotated[int, Ge(1), Le(1000)] = 3,
    growth: Annotated[float, Ge(1), Le(10)] = 1.0,
    final: Small = 0.0,
) -> float:
    """Decrease from 1 to `final` along half a cosine `cycles` times, each `growth` times as long (SGDR, section 3)."""
    lengths = [growth**k for k in range(cycles)]
    remaining = progress * sum(lengths)
    for length in lengths[:-1]:
        if remaining < length:
            break
        remaining -= length
    else:
        length = lengths[-1]
    return cosine(min(remaining / length, 1.0), final)


def polynomial(progress: float, power: PositiveFloat = 2.0, final: Small = 0.0) -> float:
    """Decrease from 1 to `final` as (1 - progress)^power (Chen et al., 2017, "DeepLab", section 4.1)."""
    return final + (1.0 - final) * float((1.0 - progress) ** power)


def exponential(progress: float, final: FinalFactor = 0.01) -> float:
    """Decrease exponentially from 1 to `final`."""
    return float(final**progress)


def triangle(progress: float, peak: Inside = 0.2, first: Small = 0.0, final: Small = 0.0) -> float:
    """Increase linearly from `first` to 1 at `peak`, then decrease to `final`."""
    if progress < peak:
        return first + (1.0 - first) * progress / peak
    return final + (1.0 - final) * (1.0 - progress) / (1.0 - peak)


def one_cycle(progress: float, peak: Inside = 0.3, first: Small = 0.04, final: Small = 4e-6) -> float:
    """Increase along half a cosine from `first` to 1 at `peak`, then decrease to `final` (Smith and Topin, 2018).

    The defaults are those of torch's OneCycleLR, whose `max_lr` is `optimizer.lr` here; momentum is constant.
    """
    if progress < peak:
        return cosine(1.0 - progress / peak, first)
    return cosine((progress - peak) / (1.0 - peak), final)


def bend(progress: float, at: Inside = 0.5, factor: Small = 0.1) -> float:
    """Decrease linearly from 1 to `factor` at progress `at`, then to 0; for runs whose loss changes there."""
    if progress < at:
        return 1.0 + (factor - 1.0) * progress / at
    return factor * (1.0 - progress) / (1.0 - at)


def step(progress: float, every: Inside = 0.3, factor: Small = 0.1) -> float:
    """Multiply by `factor` each time the progress has increased by `every`."""
    return float(factor ** int(progress / every + 1e-9))


def multistep(progress: float, at: tuple[Small, ...] = (0.6, 0.8), factor: Small = 0.1) -> float:
    """Multiply by `factor` at each progress listed in `at`."""
    return math.prod(factor for share in at if progress >= share)


def plateau(
    progress: float,  # noqa: ARG001 - every schedule takes it
    num_reductions: int = 0,
    patience: PositiveInt = 3,  # noqa: ARG001 - read by the trainer, which counts the reductions
    factor: Inside = 0.1,
) -> float:
    """Multiply by `factor` after `patience` evaluations without a better validation metric.

    The metric is that of the best weights (`val_accuracy`, `val_map50`, `val_bleu4`). The counts are those of the
    trainer, part of every checkpoint.
    """
    return float(factor**num_reductions)


def warmed_up(factor: float, progress: float, warmup: float) -> float:
    """Scale a factor by a linear increase from 0 to 1 while progress is below `warmup`."""
    return factor * min(1.0, progress / warmup) if warmup > 0 else factor
