"""The learning-rate range test: train a few steps while the learning rate rises exponentially, and record the loss.

References:
    Smith, 2017, "Cyclical learning rates for training neural networks", section 3.3.

Differences from the paper:
    The rate rises exponentially and the loss is recorded, not the accuracy, as in fastai's `lr_find`, which also
    suggests the `valley`. Losses are smoothed symmetrically, so that the curve is not shifted to higher rates.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cvlab.engine import loop, parameters
from cvlab.engine.config import TrainConfig
from cvlab.engine.task import TrainTask
from cvlab.errors import ConfigError, DivergedError

DIVERGENCE_FACTOR = 4.0  # of the smallest running mean of the loss: the test ends above it
RUNNING_DECAY = 0.9  # of the running mean
SMOOTHING_SHARE = 0.03  # standard deviation of the smoothing kernel, as a share of the planned steps
MIN_POINTS = 10  # below which nothing is suggested


@dataclass(frozen=True)
class RangeTest:
    """The recorded losses.

    Attributes:
        rates: The learning rate of each step.
        losses: Its loss, all finite.
        smoothed: The smoothed losses.
        has_diverged: Whether the loss grew without bound or was not finite, which ended the test.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    has_diverged: bool


@dataclass(frozen=True)
class Suggestions:
    """Learning rates; None where the curve has none.

    Attributes:
        steepest: Where the smoothed loss falls fastest per factor of the rate, before its minimum.
        minimum_tenth: A tenth of the rate of the smallest smoothed loss.
        valley: In the middle of the longest descent; see `_valley`.
    """

    steepest: float | None = None
    minimum_tenth: float | None = None
    valley: float | None = None


def rate_keys(config: TrainConfig) -> list[str]:
    """Return the keys of the optimizer that are learning rates. ConfigError if there is no `lr`."""
    keys = [key for key in config.optimizer.builder_arguments() if key == "lr" or key.endswith("_lr")]
    if "lr" not in keys:
        raise ConfigError(f"optimizer {config.optimizer.name} has no lr", "choose another optimizer")
    return keys


def exponential_rates(minimum: float, maximum: float, steps: int) -> list[float]:
    """Return `steps` rates from `minimum` to `maximum` with a constant ratio."""
    return [minimum * (maximum / minimum) ** (step / (steps - 1)) for step in range(steps)]


def run(
    config: TrainConfig, task: TrainTask, rates: Sequence[float], on_step: Callable[[int, float, float], None]
) -> RangeTest:
    """Train one step for each learning rate, which changes the model of the task.

    Args:
        config: What is trained; other learning rates of its optimizer, such as `bias_lr`, rise in proportion.
        task: Model, loss and batches.
        rates: The values of `optimizer.lr`.
        on_step: Called with step, rate and loss after each step; may raise to stop.

    Returns:
        The losses until the last rate, or until the loss diverges.

    Raises:
        DivergedError: The first loss is not finite.
    """
    optimizer = parameters.build_optimizer(config, task.model)
    state = loop.TrainState(task.model, optimizer, None, task.ctx.make_scaler())
    lr = config.optimizer.builder_arguments()["lr"]
    steps = loop.fit(
        state,
        task.loss_fn,
        task.get_batch,
        lr_factor=lambda step: rates[step] / lr,
        ctx=task.ctx,
        clip_norm=config.clip_norm,
        sam=config.sam,
        split_batch=task.split_batch,
        attack=task.attack,
    )
    losses: list[float] = []
    mean, smallest = 0.0, math.inf
    has_diverged = False
    try:
        for step, parts in enumerate(itertools.islice(steps, len(rates))):
            loss = float(parts["loss"])
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is not finite at step {step}")
            losses.append(loss)
            on_step(step, rates[step], loss)
            mean = RUNNING_DECAY * mean + (1 - RUNNING_DECAY) * loss
            running = mean / (1 - RUNNING_DECAY ** (step + 1))
            smallest = min(smallest, running)
            if running > DIVERGENCE_FACTOR * abs(smallest) and step >= MIN_POINTS:
                has_diverged = True
                break
    except DivergedError as error:
        has_diverged = True
        if not losses:
            raise DivergedError(
                f"the loss is not finite before the first update (lr {rates[0]:g})", "check the data and the model"
            ) from error
    return RangeTest(list(rates[: len(losses)]), losses, smooth(losses, len(rates) * SMOOTHING_SHARE), has_diverged)


def smooth(values: Sequence[float], sigma: float) -> list[float]:
    """Smooth values with a Gaussian kernel, renormalized at both ends."""
    radius = max(1, math.ceil(3 * sigma))
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    smoothed = []
    for center in range(len(values)):
        near = range(max(0, center - radius), min(len(values), center + radius + 1))
        near_weights = [weights[index - center + radius] for index in near]
        total = sum(weight * values[index] for index, weight in zip(near, near_weights, strict=True))
        smoothed.append(total / sum(near_weights))
    return smoothed


def suggest(test: RangeTest) -> Suggestions:
    """Return learning rates to train with; none if the loss does not fall."""
    smoothed, rates = test.smoothed, test.rates
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    if len(smoothed) < MIN_POINTS or lowest < 2:
        return Suggestions()
    slopes = {k: smoothed[k + 1] - smoothed[k - 1] for k in range(1, lowest)}  # the rates have a constant ratio
    steepest = min(slopes, key=slopes.__getitem__)
    return Suggestions(rates[steepest], rates[lowest] / 10, rates[_valley(smoothed)])


def _valley(losses: Sequence[float]) -> int:
    """Return the index in the middle of the longest decreasing subsequence, rounded as by fastai's `valley`."""
    lengths = [1] * len(losses)
    for end in range(len(losses)):
        shorter = (lengths[start] for start in range(end) if losses[start] > losses[end])
        lengths[end] = 1 + max(shorter, default=0)
    last = max(range(len(losses)), key=lengths.__getitem__)
    third = lengths[last] / 3
    return max(0, last - lengths[last] + int(third) + int(third / 2))
