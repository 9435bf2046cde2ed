"""Turn a budget of training time into a number of steps, and steps into progress between 0 and 1.

The number of steps is planned from the measured time of a few, and planned again during training from the time of all
so far, so that the learning-rate schedule ends with the budget even if the machine becomes slower or faster. The
history of the plan is recorded: a run of the same steps with the same history is bit-for-bit identical.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cvlab.errors import ConfigError

PlanHistory = tuple[tuple[int, int], ...]  # until which step how many steps were planned
REPLAN_AT = (  # progress; denser towards the end, where little time is left to make up for a slower machine
    *(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *(0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975),
)
RESERVED_SHARE = 0.003  # of the budget: a plan should end before its budget, not after
MIN_GAIN = 0.002  # a plan to which replanning would add a smaller share of steps stays as it is
PROBE_SHARE = 0.03  # of the budget, spent beforehand on measuring the time of a step ...
MAX_PROBE_SECONDS = 5.0  # ... but no longer than this
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """Number of steps of a run, and how many were planned before.

    At each change of the plan the progress that is left is divided evenly among the steps that are left.

    Attributes:
        total_steps: Number of steps of the whole run.
        history: For each change, the step at which it was made and the number of steps planned until then.
    """

    total_steps: int
    history: PlanHistory = ()

    def progress(self, step: float) -> float:
        """Return the progress at a step or between two steps: 0 at the start of the run, 1 at its end."""
        start, done = 0, 0.0
        for until, total in self.history:
            if step <= until:
                return done + (1 - done) * ((step - start) / (total - start))
            start, done = until, done + (1 - done) * ((until - start) / (total - start))
        return done + (1 - done) * min(1.0, (step - start) / (self.total_steps - start))

    def changed(self, step: int, total_steps: int) -> "Plan":
        """Return the plan that has another end from `step` on, at least one step later; progress has no jump."""
        return Plan(max(total_steps, step + 1), (*self.history, (step, self.total_steps)))

    def is_replanned_after(self, step: int) -> bool:
        """Return whether the plan is reconsidered after a step."""
        before, now = self.progress(step - 1), self.progress(step)
        return step < self.total_steps and any(before < share <= now for share in REPLAN_AT)

    def replan(self, step: int, seconds_left: float, seconds_per_step: float) -> "Plan":
        """Return the plan that ends when no seconds are left; this one if it does."""
        planned = self.total_steps - step
        possible = steps_within(seconds_left, seconds_per_step)
        fits = planned <= possible <= planned * (1 + MIN_GAIN)
        return self if fits else self.changed(step, step + possible)


def usable_seconds(budget_seconds: float) -> float:
    """Return how many seconds of a budget to plan with."""
    return budget_seconds * (1 - RESERVED_SHARE)


def steps_within(seconds: float, seconds_per_step: float) -> int:
    """Return the number of steps that end within a time."""
    return max(0, int(seconds / seconds_per_step))


def seconds_per_step(steps: Iterator[object], budget_seconds: float, synchronize: Callable[[], None]) -> float:
    """Return the median time of a few steps.

    Args:
        steps: Takes a step for each item.
        budget_seconds: Budget of the run, of which a small share is spent here.
        synchronize: Waits until the device has finished.
    """
    limit = min(PROBE_SHARE * budget_seconds, MAX_PROBE_SECONDS)
    times: list[float] = []
    start = last = time.perf_counter()
    while len(times) <= WARM_UP_STEPS + 1 or last - start < limit:
        next(steps)
        synchronize()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    measured = sorted(times[WARM_UP_STEPS:])
    return measured[len(measured) // 2]


def first_plan(seconds: float, seconds_per_step: float) -> Plan:
    """Return the plan for a budget.

    Raises:
        ConfigError: The budget is too short for a single step.
    """
    possible = steps_within(usable_seconds(seconds), seconds_per_step)
    if possible < 1:
        raise ConfigError(
            f"duration.seconds: {seconds:g} s are too short for a step, which takes {seconds_per_step:.2g} s"
        )
    return Plan(possible)
