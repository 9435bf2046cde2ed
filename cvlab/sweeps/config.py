"""The configuration of a sweep: a base configuration and what varies."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from cvlab.config.overrides import flatten
from cvlab.config.schema import FrozenModel, NestedConfig, NonNegativeInt
from cvlab.runs.records import is_number
from cvlab.sweeps import grid as sweeps_grid
from cvlab.sweeps.executors import SubmitConfig
from cvlab.sweeps.search import SearchConfig

MAX_TRIALS = 1000
LOG_RATIO = 4  # of the largest to the smallest number of an axis, from which on it is logarithmic


Values = dict[str, tuple[Any, ...]]


class Condition(FrozenModel):
    """Keys that depend on others: if all of `when` hold, `set` is applied to the trial."""

    when: dict[str, Any] = Field(description="dotted keys and the values they must have")
    set: dict[str, Any] = Field(description="dotted keys and the values they get")


class SweepConfig(NestedConfig):
    """A base configuration and what varies."""

    grid: Values = Field({}, description="dotted keys with lists of values: every combination is a trial")
    zip: Values = Field({}, description="dotted keys with lists of equal length, which form one axis")
    conditions: tuple[Condition, ...] = Field((), description="keys that depend on others")
    seeds: tuple[NonNegativeInt, ...] = Field((), description="seeds of each trial; empty: the seed of the base")
    search: SearchConfig | None = Field(
        None, description="instead of axes: trials are proposed one by one from the previous ones"
    )
    workers: Annotated[int, Ge(1), Le(64)] | None = Field(
        None, description="number of concurrent trials; null: one on this machine, as many as fit on a cluster"
    )
    submit: SubmitConfig = Field(SubmitConfig(), description="where the trials run")
    diverged_values: dict[str, float] = Field(
        {}, description="metrics of a trial that diverged, for expectations and plots; by default it has none"
    )

    @model_validator(mode="after")
    def _sizes(self) -> "SweepConfig":
        for key, values in {**self.grid, **self.zip}.items():
            if not values:
                raise ValueError(f"{key}: the list of values is empty")
        if len({len(values) for values in self.zip.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(values)}" for key, values in self.zip.items())
            raise ValueError(f"zip: the lists must have equal lengths: {lengths}")
        if self.grid.keys() & self.zip.keys():
            raise ValueError(f"{min(self.grid.keys() & self.zip.keys())} is in grid and in zip")
        sizes = [len(values) for values in self.grid.values()] + [len(v) for v in list(self.zip.values())[:1]]
        if (count := math.prod(sizes) * max(1, len(self.seeds))) > MAX_TRIALS:
            raise ValueError(f"{count} trials; at most {MAX_TRIALS}")
        for key, values in {**self.grid, "seeds": self.seeds}.items():
            if len({repr(value) for value in values}) < len(values):
                raise ValueError(f"{key}: a value is listed twice")
        return self

    @model_validator(mode="after")
    def _each_key_once(self) -> "SweepConfig":
        axis = "grid" if self.grid else "zip" if self.zip else "seeds"
        if self.search and getattr(self, axis):
            raise ValueError(f"{axis} and search: a search proposes all trials; give one of the two")
        space = self.search.space if self.search else {}
        varied = [*self.grid, *self.zip, *space, *(["seed"] if self.seeds else [])]
        for key in varied:
            parents = [other for other in varied if key.startswith(f"{other}.")]
            if parents or varied.count(key) > 1:
                raise ValueError(f"{key} is varied twice" + (f", also by {parents[0]}" if parents else ""))
        return self

    def trials(self) -> list[sweeps_grid.Trial]:
        """Return the trials, not validated; for a search, trials with every bound and every choice."""
        return self.apply_changes(self.search.boundary_points() if self.search else self.changes())

    def changes(self) -> list[sweeps_grid.Changes]:
        """Return the changes of each trial to the base, of a sweep without a search."""
        return sweeps_grid.combinations(self.grid, self.zip, self.seeds)

    def settings_of(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return what varies independently in the changes of a trial: all keys but the seed, those of `zip` as one."""
        tied = {key: changes[key] for key in self.zip}
        settings = {key: value for key, value in changes.items() if key != "seed" and key not in tied}
        if tied:
            settings[" + ".join(tied)] = tuple(tied.values()) if len(tied) > 1 else next(iter(tied.values()))
        return settings

    def log_keys(self) -> list[str]:
        """Return the keys whose numbers are compared by ratios: ranges with `log`, lists that span a factor of 4."""
        space = self.search.space if self.search else {}
        keys = [key for key, values in space.items() if getattr(values, "log", False)]
        choices = {key: values for key, values in space.items() if isinstance(values, tuple)}
        lists = {**choices, **self.grid, **(self.zip if len(self.zip) == 1 else {})}
        for key, values in lists.items():
            numbers = [v for v in values if is_number(v)]
            if len(numbers) == len(values) and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_RATIO:
                keys.append(key)
        return keys

    def apply_changes(self, changes: Iterable[Mapping[str, Any]], first: int = 0) -> list[sweeps_grid.Trial]:
        """Return one trial for each set of changes to the base, numbered from `first`."""
        conditions = [(condition.when, condition.set) for condition in self.conditions]
        return sweeps_grid.expand(self.base, map(dict, changes), conditions, first)

    def varied_keys(self) -> list[str]:
        """Return the dotted keys in which the trials differ, except the seed; blocks are expanded."""
        changes = [*self.grid.items(), *self.zip.items(), *(self.search.values().items() if self.search else ())]
        changes += [(key, (value,)) for condition in self.conditions for key, value in condition.set.items()]
        keys: dict[str, None] = {}
        for key, values in changes:
            blocks = [flatten(value, f"{key}.") for value in values if isinstance(value, Mapping)]
            keys |= {inner: None for block in blocks for inner in block} if blocks else {key: None}
        return [key for key in keys if key != "seed"]
