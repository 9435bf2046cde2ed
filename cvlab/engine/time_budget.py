"""A budget of training time as a number of steps, and how far along a step is.

The steps are planned from the measured time of a few, and planned again on the way from the time of all so far, so that
the schedule ends with the budget although the machine becomes slower or faster. The corrections are part of the record:
a run of the same steps and corrections has the same bits.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cvlab.errors import ConfigError

Correction = tuple[int, int]
# How far along a plan is looked at again.
REVIEWS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
RESERVE = 0.003  # the share of a budget that is kept back: a plan is to end before its budget, not after
WORTH = 0.002  # a plan that could have only so small a share of steps more stays as it is
MEASURED_SHARE = 0.03  # of a budget, spent beforehand on measuring the time of a step ...
MEASURED_SECONDS = 5.0  # ... but no longer than this
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """How many steps there are, and what was planned before: `corrections` are (until this step, so many in all).

    From each correction on, what is left is shared out evenly among the steps that are left.
    """

    total: int
    corrections: tuple[Correction, ...] = ()

    def progress(self, step: float) -> float:
        """Return how far the run is at a step, or between two: 0 at its start, 1 at its end."""
        start, done = 0, 0.0
        for until, total in self.corrections:
            if step <= until:
                return done + (1 - done) * ((step - start) / (total - start))
            start, done = until, done + (1 - done) * ((until - start) / (total - start))
        return done + (1 - done) * min(1.0, (step - start) / (self.total - start))

    def corrected(self, step: int, total: int) -> "Plan":
        """Return the plan that goes on from `step` without a jump to another end, at least one step further."""
        return Plan(max(total, step + 1), (*self.corrections, (step, self.total)))

    def is_reviewed(self, step: int) -> bool:
        """Whether it is looked at again after this step."""
        before, now = self.progress(step - 1), self.progress(step)
        return step < self.total and any(before < share <= now for share in REVIEWS)

    def reviewed(self, step: int, seconds_left: float, seconds_per_step: float) -> "Plan":
        """Return the plan that ends when no seconds are left; this one if it does."""
        planned = self.total - step
        possible = steps_within(seconds_left, seconds_per_step)
        fits = planned <= possible <= planned * (1 + WORTH)
        return self if fits else self.corrected(step, step + possible)


def usable_seconds(budget_seconds: float) -> float:
    """Return how many seconds of a budget are planned with."""
    return budget_seconds * (1 - RESERVE)


def steps_within(seconds: float, seconds_per_step: float) -> int:
    """Return how many steps end within so many seconds."""
    return max(0, int(seconds / seconds_per_step))


def seconds_per_step(steps: Iterator[object], budget_seconds: float, settle: Callable[[], None]) -> float:
    """Return the median time of the steps that are taken, few compared with a budget; `settle` waits for the device."""
    limit = min(MEASURED_SHARE * budget_seconds, MEASURED_SECONDS)
    times: list[float] = []
    began = last = time.perf_counter()
    while len(times) <= WARM_UP_STEPS + 1 or last - began < limit:
        next(steps)
        settle()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    measured = sorted(times[WARM_UP_STEPS:])
    return measured[len(measured) // 2]


def first_plan(seconds: float, seconds_per_step: float) -> Plan:
    """Return the plan of a budget; ConfigError where not one step fits."""
    possible = steps_within(usable_seconds(seconds), seconds_per_step)
    if possible < 1:
        raise ConfigError(
            f"duration.seconds: {seconds:g} s are too short for a step, which takes {seconds_per_step:.2g} s"
        )
    return Plan(possible)
