"""The configuration of a sweep: a base configuration and what varies."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from cvlab.config.schema import DataConfig, ExperimentConfig, FrozenModel, NonNegativeInt
from cvlab.sweeps import grid as sweeps_grid
from cvlab.sweeps.executors import SubmitConfig
from cvlab.sweeps.search import SearchConfig

MAX_TRIALS = 1000


Values = dict[str, tuple[Any, ...]]


class Condition(FrozenModel):
    """Keys that are tied to others: where all of `when` hold, `set` is laid over the arm."""

    when: dict[str, Any] = Field(description="dotted keys and the values they must have")
    set: dict[str, Any] = Field(description="dotted keys and the values they get")


class SweepConfig(ExperimentConfig):
    """A base configuration and what varies."""

    base: dict[str, Any] = Field(description="an ordinary configuration; `from:` names one to start from")
    grid: Values = Field({}, description="dotted keys with lists of values: every combination is an arm")
    zip: Values = Field({}, description="dotted keys with lists of one length, walked together as one axis")
    conditions: tuple[Condition, ...] = Field((), description="keys tied to others")
    seeds: tuple[NonNegativeInt, ...] = Field((), description="every arm once with each; empty: the base's own seed")
    search: SearchConfig | None = Field(
        None, description="in place of an axis: arms proposed one by one, each from the last"
    )
    workers: Annotated[int, Ge(1), Le(64)] | None = Field(
        None, description="arms at a time; null: one on this machine, elsewhere as many as there is room for"
    )
    submit: SubmitConfig = Field(SubmitConfig(), description="where arms run")
    diverged_counts_as: dict[str, float] = Field(
        {}, description="what expectations and plots take for an arm that diverged; by default it has no metrics"
    )

    @model_validator(mode="after")
    def _sizes(self) -> "SweepConfig":
        for key, values in {**self.grid, **self.zip}.items():
            if not values:
                raise ValueError(f"{key}: the list of values is empty")
        if len({len(values) for values in self.zip.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(values)}" for key, values in self.zip.items())
            raise ValueError(f"zip: the lists must be of one length: {lengths}")
        if self.grid.keys() & self.zip.keys():
            raise ValueError(f"{min(self.grid.keys() & self.zip.keys())} is in grid and in zip")
        sizes = [len(values) for values in self.grid.values()] + [len(v) for v in list(self.zip.values())[:1]]
        if (count := math.prod(sizes) * max(1, len(self.seeds))) > MAX_TRIALS:
            raise ValueError(f"{count} arms; at most {MAX_TRIALS}")
        for key, values in {**self.grid, "seeds": self.seeds}.items():
            if len({repr(value) for value in values}) < len(values):
                raise ValueError(f"{key}: a value is there twice")
        return self

    @model_validator(mode="after")
    def _each_key_once(self) -> "SweepConfig":
        axis = "grid" if self.grid else "zip" if self.zip else "seeds"
        if self.search and getattr(self, axis):
            raise ValueError(f"{axis} and search: a search proposes all its arms; give one of the two")
        space = self.search.space if self.search else {}
        changed = [*self.grid, *self.zip, *space, *(["seed"] if self.seeds else [])]
        for key in changed:
            above = [other for other in changed if key.startswith(f"{other}.")]
            if above or changed.count(key) > 1:
                raise ValueError(f"{key} is varied twice" + (f", also by {above[0]}" if above else ""))
        return self

    @property
    def data(self) -> DataConfig | None:
        """The base's data, as far as every experiment has it."""
        block = self.base.get("data")
        if not isinstance(block, Mapping):
            return None
        return DataConfig(**{key: block[key] for key in DataConfig.model_fields if key in block})

    def with_data(self, data: DataConfig) -> "SweepConfig":
        """Return the sweep over other data."""
        return self.model_copy(update={"base": {**self.base, "data": {**self.base["data"], **data.model_dump()}}})

    def arms(self) -> list[sweeps_grid.Trial]:
        """Return the arms, not validated; of a search those with every end and every choice."""
        return self.laid_over(
            self.search.corners() if self.search else sweeps_grid.combinations(self.grid, self.zip, self.seeds)
        )

    def laid_over(self, changes: Iterable[Mapping[str, Any]], first: int = 0) -> list[sweeps_grid.Trial]:
        """Return arms that change the base as told, numbered from `first`."""
        conditions = [(condition.when, condition.set) for condition in self.conditions]
        return sweeps_grid.expand(self.base, map(dict, changes), conditions, first)

    def varied(self) -> list[str]:
        """Return the dotted keys in which the arms differ, the seed left out; those of whole blocks one by one."""
        changed = [*self.grid.items(), *self.zip.items(), *(self.search.values().items() if self.search else ())]
        changed += [(key, (value,)) for condition in self.conditions for key, value in condition.set.items()]
        found: dict[str, None] = {}
        for key, values in changed:
            blocks = [flatten_block(value, f"{key}.") for value in values if isinstance(value, Mapping)]
            found |= {inner: None for block in blocks for inner in block} if blocks else {key: None}
        return [key for key in found if key != "seed"]


def flatten_block(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested block with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in block.items():
        flat |= flatten_block(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
