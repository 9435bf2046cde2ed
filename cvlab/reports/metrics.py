"""What a run declares about its metrics in summary.json: their units, and which direction is better."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

MetricInfo = Mapping[str, Mapping[str, Any]]  # by name: {"unit": "s", "better": "higher" | "lower" | None}
SPLITS = ("test_", "", "val_", "train_")  # prefixes of metrics, in the order of interest; `best_val_` comes last
ENGINE_FAMILIES = {"loss": "loss", "lr": "learning rate"}  # of the curves that every training run logs -> their title
FRACTION = "fraction"


def unit(name: str, info: MetricInfo) -> str:
    """Return the unit of a metric; empty if it has none or the run does not declare it."""
    return str(info.get(name, {}).get("unit") or "")


def better(name: str, info: MetricInfo) -> str:
    """Return `higher` or `lower`; empty if neither is better or the run does not declare it."""
    return str(info.get(name, {}).get("better") or "")


def headline(values: Mapping[str, Any], info: MetricInfo, count: int = 2) -> list[str]:
    """Return the names of the metrics that sum up a run: fractions of which more is better, test before validation.

    Args:
        values: The metrics of the run.
        info: What the run declares about them.
        count: Maximum number of names.
    """
    numbers = [name for name, value in values.items() if isinstance(value, (int, float))]
    ranked = [name for name in numbers if better(name, info) == "higher"]
    ranked.sort(key=lambda name: (unit(name, info) != FRACTION, _rank(name)))
    return [*ranked, *(name for name in numbers if name not in ranked)][:count]


def _rank(name: str) -> int:
    if name.startswith("best_"):
        return len(SPLITS)
    prefix = next((split for split in SPLITS if split and name.startswith(split)), "")
    return SPLITS.index(prefix)


def family(name: str) -> str:
    """Return what a metric has in common with others that are drawn with it: the last word before any slash."""
    return name.partition("/")[0].rpartition("_")[2]


def group(names: Iterable[str]) -> dict[str, list[str]]:
    """Group metrics by their family, in the order of the first of each; the settings of the engine come last."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(family(name), []).append(name)
    if "lr" in groups:
        groups["lr"] = groups.pop("lr")
    return groups


def title(key: str, names: list[str]) -> str:
    """Return the title of a chart of a family."""
    return ENGINE_FAMILIES.get(key, key if len(names) > 1 else names[0])


def is_plotted(key: str, names: Iterable[str], info: MetricInfo) -> bool:
    """Whether a family has a plot in the run directory: the engine's own, and those that an experiment declares."""
    return key in ENGINE_FAMILIES or any(better(name, info) for name in names)


def file_name(key: str) -> str:
    """Return the name of a family's plot, relative to the run directory."""
    return f"plots/{re.sub(r'[^a-zA-Z0-9]+', '_', key)}.png"
