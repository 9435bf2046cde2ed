"""The trials of a sweep: every combination of a grid, tied values and seeds, applied to one configuration.

Keys are dotted, as in overrides; a value may be a whole block (`optimizer: [{name: sgd}, {name: adam}]`).
"""

import copy
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvlab.config.overrides import Raw, get, put

Changes = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: the name of its folder, and its configuration before validation."""

    name: str
    raw: Raw


def combinations(
    grid: Mapping[str, Sequence[Any]], tied: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> list[Changes]:
    """Return the changes of each trial: the product of the grid, the tied values (one axis) and the seeds."""
    axes: list[list[Changes]] = [[{key: value} for value in values] for key, values in grid.items()]
    if tied:
        axes.append([dict(zip(tied, values, strict=True)) for values in zip(*tied.values(), strict=True)])
    if seeds:
        axes.append([{"seed": seed} for seed in seeds])
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]


def expand(
    base: Raw, changes: Iterable[Changes], conditions: Iterable[tuple[Changes, Changes]] = (), first: int = 0
) -> list[Trial]:
    """Apply each set of changes to `base`, then the `conditions` (when, set) that hold; number trials from `first`."""
    trials = []
    for number, change in enumerate(changes, first):
        raw = copy.deepcopy(base)
        for key, value in change.items():
            put(raw, key, value)
        for when, then in conditions:
            if all(get(raw, key) == value for key, value in when.items()):
                for key, value in then.items():
                    put(raw, key, value)
        slug = trial_slug(change)
        raw["name"] = slug
        trials.append(Trial(f"{number:03d}-{slug}", raw))
    return trials


def trial_slug(changes: Changes, longest: int = 56) -> str:
    """Return the name of a trial, made of its changes: `lr-0.005-batchnorm-true-seed-0`."""
    parts = [f"{key.rpartition('.')[2]}-{format_value(value)}" for key, value in changes.items()]
    slug = re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")
    return slug[:longest].strip("-.") or "trial"


def format_value(value: Any) -> str:
    """Return a short text of a value."""
    if isinstance(value, Mapping):
        return "-".join(format_value(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return "-".join(format_value(item) for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
