"""The arms of a sweep: every combination of a grid, a list of tied values, and seeds, laid over one configuration.

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
    """One run of a sweep: a name fit for a folder, and its configuration before validation."""

    name: str
    raw: Raw


def combinations(
    grid: Mapping[str, Sequence[Any]], tied: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> list[Changes]:
    """Return what each arm changes: the product of the grid, the tied values (walked in step) and the seeds."""
    axes: list[list[Changes]] = [[{key: value} for value in values] for key, values in grid.items()]
    if tied:
        axes.append([dict(zip(tied, values, strict=True)) for values in zip(*tied.values(), strict=True)])
    if seeds:
        axes.append([{"seed": seed} for seed in seeds])
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]


def expand(
    base: Raw, changes: Iterable[Changes], conditions: Iterable[tuple[Changes, Changes]] = (), first: int = 0
) -> list[Trial]:
    """Lay each set of changes over `base`, then what `conditions` (when, set) tie to it; numbers begin at `first`."""
    arms = []
    for number, changed in enumerate(changes, first):
        raw = copy.deepcopy(base)
        for key, value in changed.items():
            put(raw, key, value)
        for when, then in conditions:
            if all(get(raw, key) == value for key, value in when.items()):
                for key, value in then.items():
                    put(raw, key, value)
        slug = trial_slug(changed)
        raw["name"] = slug
        arms.append(Trial(f"{number:03d}-{slug}", raw))
    return arms


def trial_slug(changes: Changes, longest: int = 56) -> str:
    """Name an arm after what it changes: `lr-0.005-batchnorm-true-seed-0`."""
    parts = [f"{key.rpartition('.')[2]}-{format_value(value)}" for key, value in changes.items()]
    slug = re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")
    return slug[:longest].strip("-.") or "arm"


def format_value(value: Any) -> str:
    """Write a value shortly."""
    if isinstance(value, Mapping):
        return "-".join(format_value(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return "-".join(format_value(item) for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
