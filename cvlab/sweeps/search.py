"""Adaptive search: what the next trial of a sweep should try, given those before it; which of them are hopeless.

Paper: Bergstra et al., 2011, "Algorithms for Hyper-Parameter Optimization" (TPE), as Optuna has it; the median rule is
that of Golovin et al., 2017, "Google Vizier".
Differs: no study is stored. One is built anew from the trials for every proposal, with a sampler seeded by the search's
seed and the trial's number, so that the same trials lead to the same proposal, before a crash and after it.
"""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Le
from pydantic import Discriminator, Field, Tag, model_validator

from cvlab.config.schema import FrozenModel, NonNegativeInt, PositiveFloat, PositiveInt

MAX_TRIALS = 1000
Changes = dict[str, Any]
Curve = dict[int, float]  # the metric after each step at which it was measured


class Range(FrozenModel):
    """Numbers between two ends, both included."""

    low: float = Field(description="the smallest value")
    high: float = Field(description="the largest value")
    log: bool = Field(False, description="evenly on a logarithmic scale")
    step: PositiveFloat | None = Field(None, description="only low, low + step, low + 2 step, ...")
    int: bool = Field(False, description="whole numbers only")

    @model_validator(mode="after")
    def _possible(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: low must be above 0" if self.low <= 0 else "log goes without step")
        numbers = [self.low, self.high, *([self.step] if self.step is not None else [])]
        if self.int and any(number != round(number) for number in numbers):
            raise ValueError("int: low, high and step must be whole numbers")
        return self

    def ends(self) -> tuple[Any, Any]:
        """Return the smallest and the largest value, as the arms get them."""
        return (round(self.low), round(self.high)) if self.int else (self.low, self.high)


def _kind(value: Any) -> str:
    return "range" if isinstance(value, (Mapping, Range)) else "choices"


Choices = tuple[Any, ...]
Space = Annotated[Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_kind)]


class SearchConfig(FrozenModel):
    """What is searched, for what, and how long."""

    algorithm: Literal["optuna"] = Field(description="who proposes")
    trials: Annotated[PositiveInt, Le(MAX_TRIALS)] = Field(description="arms in all")
    space: dict[str, Space] = Field(
        description="dotted keys with {low, high} (log, step, int) or with a list of choices"
    )
    metric: str = Field("val_accuracy", description="what is to become best, as the arms end with it")
    goal: Literal["maximize", "minimize"] = Field("maximize", description="which values are better")
    prune: Literal["median", "none"] = Field(
        "none", description="median: end an arm at an evaluation where it is worse than the median of those that ended"
    )
    startup: PositiveInt = Field(
        10, description="trials at random first, and trials that must have ended before one is pruned"
    )
    seed: NonNegativeInt = Field(0, description="of the proposals")

    @model_validator(mode="after")
    def _has_choices(self) -> "SearchConfig":
        if not self.space:
            raise ValueError("space: nothing to search")
        for key, choices in self.space.items():
            if not isinstance(choices, Range) and not choices:
                raise ValueError(f"space.{key}: the list of choices is empty")
            if not isinstance(choices, Range) and len(set(map(repr, choices))) < len(choices):
                raise ValueError(f"space.{key}: a choice is there twice")
        return self

    def better(self, value: float, other: float) -> bool:
        """Whether one value of the metric is better than another."""
        return value > other if self.goal == "maximize" else value < other

    def values(self) -> dict[str, tuple[Any, ...]]:
        """Return the ends of each range and all choices."""
        return {key: space.ends() if isinstance(space, Range) else space for key, space in self.space.items()}

    def corners(self) -> list[Changes]:
        """Return trials that have every end and every choice once, the other keys at their first: to be validated."""
        first = {key: values[0] for key, values in self.values().items()}
        return [first, *({**first, key: value} for key, values in self.values().items() for value in values[1:])]


class TrialRecord(NamedTuple):
    """What an arm has tried and how it went; `value` is None unless it is done."""

    changes: Changes
    state: Literal["running", "done", "pruned", "failed"]
    value: float | None = None
    curve: Curve = {}  # noqa: RUF012 - never changed


def propose(search: SearchConfig, trials: Sequence[TrialRecord]) -> Changes:
    """Return what the next trial is to change."""
    import numpy as np
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(np.random.SeedSequence([search.seed, len(trials)]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is experimental: trials that run count as bad for the moment
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup, constant_liar=True)
        study = optuna.create_study(direction=search.goal, sampler=sampler)
        study.add_trials([_told(search, trial) for trial in trials])
        found = study.ask(_distributions(search)).params
    return {key: found[key] if isinstance(space, Range) else space[found[key]] for key, space in search.space.items()}


def _distributions(search: SearchConfig) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, space in search.space.items():
        if not isinstance(space, Range):
            found[key] = CategoricalDistribution(range(len(space)))  # a choice may be a block; its place is a number
        elif space.int:
            found[key] = IntDistribution(*space.ends(), log=space.log, step=round(space.step or 1))
        else:
            found[key] = FloatDistribution(space.low, space.high, log=space.log, step=space.step)
    return found


def _told(search: SearchConfig, trial: TrialRecord) -> Any:
    """Return a trial as Optuna knows it."""
    from optuna.trial import TrialState, create_trial

    states = {"running": "RUNNING", "done": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    return create_trial(
        state=TrialState[states[trial.state]],
        value=trial.value,
        params={key: _place(space, trial.changes[key]) for key, space in search.space.items()},
        distributions=_distributions(search),
        intermediate_values=trial.curve if trial.state == "pruned" else {},
    )


def _place(space: Range | Choices, value: Any) -> Any:
    return value if isinstance(space, Range) else list(map(repr, space)).index(repr(value))


def should_prune(search: SearchConfig, curve: Curve, others: Sequence[Curve]) -> str | None:
    """Return why a trial should end: its best value so far is worse than the median of `others` at that step."""
    if not curve:
        return None
    step = max(curve)
    values = [value for value in (_value_at(other, step) for other in others) if value is not None]
    if len(values) < search.startup:
        return None
    median = statistics.median(values)
    best = max(curve.values()) if search.goal == "maximize" else min(curve.values())
    if not search.better(median, best):
        return None
    return f"{search.metric} {best:.4g}, the median of {len(values)} trials at step {step} is {median:.4g}"


def _value_at(curve: Mapping[int, float], step: int) -> float | None:
    """Return the last value that was measured up to a step."""
    known = [at for at in curve if at <= step]
    return curve[max(known)] if known else None
