"""Search: propose the next trial of a sweep, at random or from the previous ones, and decide which to prune.

References: Bergstra and Bengio, 2012, "Random Search for Hyper-Parameter Optimization"; Bergstra et al., 2011,
"Algorithms for Hyper-Parameter Optimization" (TPE, as implemented by Optuna); Golovin et al., 2017, "Google Vizier"
(the median rule for pruning).
Differences from the papers: no study is stored. It is built from the trials for every proposal, with a sampler seeded
by the search's seed and the number of the trial, so that the same trials lead to the same proposal, also after a crash.
Random values are a function of the seed, the number of the trial and the key alone; no point is drawn twice.
"""

import itertools
import math
import random
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Le
from pydantic import Discriminator, Field, Tag, model_validator

from cvlab.config.schema import FrozenModel, NonNegativeInt, PositiveFloat, PositiveInt
from cvlab.sweeps.asha import AshaConfig

MAX_TRIALS = 1000
Changes = dict[str, Any]
Curve = dict[int, float]  # the value of the metric by the step at which it was measured


class Range(FrozenModel):
    """Numbers between two bounds, both included."""

    low: float = Field(description="the smallest value")
    high: float = Field(description="the largest value")
    log: bool = Field(False, description="evenly on a logarithmic scale")
    step: PositiveFloat | None = Field(None, description="only low, low + step, low + 2 step, ...")
    int: bool = Field(False, description="whole numbers only")

    @model_validator(mode="after")
    def _is_consistent(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: low must be above 0" if self.low <= 0 else "log and step exclude each other")
        numbers = [self.low, self.high, *([self.step] if self.step is not None else [])]
        if self.int and any(number != round(number) for number in numbers):
            raise ValueError("int: low, high and step must be whole numbers")
        return self

    def bounds(self) -> tuple[Any, Any]:
        """Return the smallest and the largest value, as the trials use them."""
        return (round(self.low), round(self.high)) if self.int else (self.low, self.high)

    def num_values(self) -> float:
        """Return the number of values; infinity unless there is a step or the numbers are whole."""
        step = self.step or (1.0 if self.int else None)
        return math.inf if step is None else math.floor(min((self.high - self.low) / step, 2.0**53) + 1e-9) + 1

    def at(self, quantile: float) -> Any:
        """Return the value at a quantile in [0, 1) of the distribution from which random search draws."""
        if not self.int and self.step is None:
            return self._between(self.low, self.high, quantile)
        if self.log:  # each whole number has the part of the axis that is rounded to it
            low, high = self.bounds()
            return min(max(round(self._between(low - 0.5, high + 0.5, quantile)), low), high)
        value = min(self.low + math.floor(quantile * self.num_values()) * (self.step or 1.0), self.high)
        return round(value) if self.int else value

    def _between(self, low: float, high: float, quantile: float) -> float:
        """Return a number between two bounds, on the scale of the range."""
        if self.log:
            value = math.exp(math.log(low) + quantile * (math.log(high) - math.log(low)))
        else:
            value = low + quantile * (high - low)
        return min(max(value, low), high)  # rounding may lead outside


def _kind(value: Any) -> str:
    return "range" if isinstance(value, (Mapping, Range)) else "choices"


Choices = tuple[Any, ...]
Space = Annotated[Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_kind)]


class SearchConfig(FrozenModel):
    """The search space, the metric and the number of trials."""

    algorithm: Literal["random", "optuna"] = Field(
        "random", description="random: drawn from the space; optuna: proposed by Optuna's TPE from the previous trials"
    )
    trials: Annotated[PositiveInt, Le(MAX_TRIALS)] = Field(description="total number of trials")
    space: dict[str, Space] = Field(
        description="dotted keys with {low, high} (log, step, int) or with a list of choices"
    )
    metric: str = Field("val_accuracy", description="the final metric that is optimized")
    goal: Literal["maximize", "minimize"] = Field("maximize", description="whether higher or lower values are better")
    prune: Literal["median", "none"] = Field(
        "none",
        description="median: stop a trial at an evaluation at which it is worse than the median of the finished ones",
    )
    asha: AshaConfig | None = Field(
        None, description="successive halving: all trials train a little, the best further; null: all to the end"
    )
    startup: PositiveInt = Field(
        10, description="number of random trials of optuna, and of finished trials before one is pruned"
    )
    seed: NonNegativeInt = Field(0, description="seed of the proposals")

    @model_validator(mode="after")
    def _has_choices(self) -> "SearchConfig":
        if not self.space:
            raise ValueError("space: nothing to search")
        for key, choices in self.space.items():
            if not isinstance(choices, Range) and not choices:
                raise ValueError(f"space.{key}: the list of choices is empty")
            if not isinstance(choices, Range) and len(set(map(repr, choices))) < len(choices):
                raise ValueError(f"space.{key}: a choice is listed twice")
        if self.asha is not None and self.prune != "none":
            raise ValueError("prune and asha: successive halving stops trials by itself; give one of the two")
        if self.algorithm == "random" and self.num_points() < self.trials:
            raise ValueError(f"trials: {self.trials}, but the space has {self.num_points():g} points; use grid for all")
        return self

    def num_points(self) -> float:
        """Return the number of points of the space, infinity if a range is continuous."""
        sizes = (space.num_values() if isinstance(space, Range) else len(space) for space in self.space.values())
        return math.prod(sizes)

    @property
    def stops_trials(self) -> bool:
        """Whether some trials do not train to their end."""
        return self.asha is not None or self.prune != "none"

    def is_better(self, value: float, other: float) -> bool:
        """Return whether one value of the metric is better than another."""
        return value > other if self.goal == "maximize" else value < other

    def values(self) -> dict[str, tuple[Any, ...]]:
        """Return the bounds of each range and all choices."""
        return {key: space.bounds() if isinstance(space, Range) else space for key, space in self.space.items()}

    def boundary_points(self) -> list[Changes]:
        """Return changes with every bound and choice once, the other keys at their first value, for validation."""
        first = {key: values[0] for key, values in self.values().items()}
        return [first, *({**first, key: value} for key, values in self.values().items() for value in values[1:])]


class TrialRecord(NamedTuple):
    """The changes of a trial, its state and its measurements; `value` is None unless it is done."""

    changes: Changes
    state: Literal["running", "done", "pruned", "failed"]
    value: float | None = None
    curve: Curve = {}  # noqa: RUF012 - never changed


def propose(search: SearchConfig, trials: Sequence[TrialRecord]) -> Changes:
    """Return the changes of the next trial."""
    return _draw(search, trials) if search.algorithm == "random" else _ask_optuna(search, trials)


def _draw(search: SearchConfig, trials: Sequence[TrialRecord]) -> Changes:
    """Return a random point of the space that no trial has."""
    drawn = {repr(trial.changes) for trial in trials}  # 1, 1.0 and true are different choices
    for attempt in itertools.count():
        changes = {key: _random_value(search, key, len(trials), attempt) for key in search.space}
        if repr(changes) not in drawn:
            return changes
    raise AssertionError("the schema ensures that the space has a point for each trial")


def _random_value(search: SearchConfig, key: str, number: int, attempt: int) -> Any:
    """Return the value of a key, independent of the other keys of the space."""
    # A string is hashed with SHA-512, and `random` yields the same numbers in all versions of Python.
    quantile = random.Random(f"{search.seed} {number} {attempt} {key}").random()
    space = search.space[key]
    return space.at(quantile) if isinstance(space, Range) else space[math.floor(quantile * len(space))]


def _ask_optuna(search: SearchConfig, trials: Sequence[TrialRecord]) -> Changes:
    """Return the proposal of Optuna's TPE sampler."""
    import numpy as np
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(np.random.SeedSequence([search.seed, len(trials)]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar, which counts running trials as bad, is experimental
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup, constant_liar=True)
        study = optuna.create_study(direction=search.goal, sampler=sampler)
        study.add_trials([_optuna_trial(search, trial) for trial in trials])
        params = study.ask(_distributions(search)).params
    return {key: params[key] if isinstance(space, Range) else space[params[key]] for key, space in search.space.items()}


def _distributions(search: SearchConfig) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {}
    for key, space in search.space.items():
        if not isinstance(space, Range):
            distributions[key] = CategoricalDistribution(range(len(space)))  # by index, as a choice may be a block
        elif space.int:
            distributions[key] = IntDistribution(*space.bounds(), log=space.log, step=round(space.step or 1))
        else:
            distributions[key] = FloatDistribution(space.low, space.high, log=space.log, step=space.step)
    return distributions


def _optuna_trial(search: SearchConfig, trial: TrialRecord) -> Any:
    """Return a trial as Optuna represents it."""
    from optuna.trial import TrialState, create_trial

    states = {"running": "RUNNING", "done": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    return create_trial(
        state=TrialState[states[trial.state]],
        value=trial.value,
        params={key: _optuna_value(space, trial.changes[key]) for key, space in search.space.items()},
        distributions=_distributions(search),
        intermediate_values=trial.curve if trial.state == "pruned" else {},
    )


def _optuna_value(space: Range | Choices, value: Any) -> Any:
    return value if isinstance(space, Range) else list(map(repr, space)).index(repr(value))


def should_prune(search: SearchConfig, curve: Curve, finished: Sequence[Curve]) -> str | None:
    """Return why a trial should stop (its best value is worse than the median of `finished`), or None."""
    if not curve:
        return None
    step = max(curve)
    values = [value for value in (_value_at(other, step) for other in finished) if value is not None]
    if len(values) < search.startup:
        return None
    median = statistics.median(values)
    best = max(curve.values()) if search.goal == "maximize" else min(curve.values())
    if not search.is_better(median, best):
        return None
    return f"{search.metric} {best:.4g}, the median of {len(values)} trials at step {step} is {median:.4g}"


def _value_at(curve: Mapping[int, float], step: int) -> float | None:
    """Return the last value that was measured up to a step."""
    earlier = [measured_at for measured_at in curve if measured_at <= step]
    return curve[max(earlier)] if earlier else None
