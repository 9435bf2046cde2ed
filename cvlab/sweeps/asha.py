"""Asynchronous successive halving (ASHA): most trials of a search stop early, the best continue.

Paper: Li et al., 2018, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2. A trial trains to the
first rung; the best 1/factor of the trials that have reached a rung continue to the next, `factor` times as far.
Decisions do not wait for trials that are still running.
Differs: the number of trials is fixed, so that a search ends; when there are enough, only promotions follow. Trials are
paused and continue from their checkpoints. A trial that diverges counts as the worst of its rung. All state is in the
run directories of the trials (`cvlab.runs.rung`), and a decision is a function of it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from cvlab.config.schema import FrozenModel, PositiveInt
from cvlab.runs.rung import Unit


class AshaConfig(FrozenModel):
    """Successive halving: how far trials train before they are compared."""

    min_epochs: PositiveInt | None = Field(None, description="epochs to the first rung, if base.duration is in epochs")
    min_steps: PositiveInt | None = Field(None, description="steps to the first rung, if base.duration is in steps")
    factor: Annotated[int, Ge(2), Le(100)] = Field(
        3, description="of the trials at a rung the best 1/factor continue, to a rung that is factor times as far"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "AshaConfig":
        if (self.min_epochs is None) == (self.min_steps is None):
            raise ValueError("give exactly one of min_epochs and min_steps")
        return self

    @property
    def unit(self) -> Unit:
        """What the limits of the rungs count."""
        return "epoch" if self.min_epochs is not None else "step"

    def limits(self, total: int) -> list[int]:
        """Return the limits of the rungs below the end of a training run of `total` epochs or steps."""
        limits, limit = [], self.min_epochs or self.min_steps or 1
        while limit < total:
            limits.append(limit)
            limit *= self.factor
        return limits


def problem(asha: AshaConfig, trials: int, duration: Mapping[str, Any], varied_keys: Sequence[str]) -> str | None:
    """Return what is wrong with the rungs of a search, None if nothing is.

    Args:
        asha: The rungs.
        trials: Number of trials.
        duration: The block `duration` of the base; empty if its experiment does not train.
        varied_keys: Dotted keys in which trials differ.
    """
    key = f"{asha.unit}s"
    total = duration.get(key)
    if not duration:
        return "only experiments that train have rungs"
    if any(name.partition(".")[0] == "duration" for name in varied_keys):
        return "trials are compared after equal durations, so that `duration` cannot vary"
    if not isinstance(total, int):
        unit = next((name for name in ("epochs", "steps", "seconds") if duration.get(name) is not None), "seconds")
        return f"min_{key}: base.duration is in {unit}" + (f"; give min_{unit}" if unit != "seconds" else "")
    limits = asha.limits(total)
    if not limits:
        return f"min_{key}: expected less than the {total} {key} of base.duration"
    if trials < asha.factor ** len(limits):
        return (
            f"{trials} trials are too few: 1 in {asha.factor}^{len(limits)} reaches the end, "
            f"so at least {asha.factor ** len(limits)}; or a larger min_{key}"
        )
    return None


class TrialRungs(NamedTuple):
    """A trial as the rule sees it: the rung that it may train to, the metric at rungs, whether it can continue."""

    rung: int
    values: Mapping[int, float]
    can_continue: bool


def promotion(trials: Sequence[TrialRungs], num_limits: int, factor: int, maximize: bool) -> int | None:
    """Return the trial to promote to its next rung, the best of the highest rung first; None if there is none."""
    sign = -1 if maximize else 1
    for rung in reversed(range(num_limits)):
        at_rung = [number for number, trial in enumerate(trials) if rung in trial.values]
        ranked = sorted(at_rung, key=lambda number: (sign * trials[number].values[rung], number))
        for number in ranked[: len(ranked) // factor]:
            if trials[number].can_continue and trials[number].rung == rung:
                return number
    return None
