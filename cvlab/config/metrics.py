"""Metrics that experiments declare: name, unit, and which direction is better."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from cvlab.errors import DivergedError

CLASS = "class"


@dataclass(frozen=True)
class Metric:
    """A number that an experiment reports.

    Attributes:
        name: Its name in metrics.jsonl and summary.json, or a pattern such as `ap50/*`.
        unit: `fraction` for a value in [0, 1], `s`, `dB`, `px` and the like; empty for counts and losses.
        better: Whether higher or lower is better; None if neither is.
        when: Whether a run of a configuration reports it; None if every run does.
        label: What stands behind the slash of a name such as `ap50/dog`.
    """

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    when: Callable[[Any], bool] | None = None
    label: str = CLASS

    def matches(self, name: str) -> bool:
        """Whether `name` is this metric."""
        return fnmatchcase(name, self.name)


def metric_info(metrics: Iterable[Metric], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return unit, direction and label, if it is no class, of each name in `names` that is declared in `metrics`."""
    declared = tuple(metrics)
    info = {}
    for name in names:
        metric = next((metric for metric in declared if metric.matches(name)), None)
        if metric is not None and (metric.unit or metric.better):
            info[name] = {"unit": metric.unit, "better": metric.better}
            if metric.label != CLASS:
                info[name]["label"] = metric.label
    return info


def require_finite(metrics: Mapping[str, Any], allow_infinite: bool = False) -> None:
    """Raise DivergedError if a metric is not finite; infinity, the PSNR of equal images, may be allowed."""
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value) and not (allow_infinite and math.isinf(value)):
            raise DivergedError(f"{name} is not finite", "lower optimizer.lr, or check the weights and the data")
