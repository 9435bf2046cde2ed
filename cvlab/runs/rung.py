"""How far a trial of a search trains before it is paused: `rung.json` in its run directory.

The search grants a trial one rung after the other; the trial pauses at the first evaluation at or after the limit of
its rung, and continues from its checkpoint when it is granted the next one.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cvlab.errors import RunDirError
from cvlab.runs.records import is_number, pruning_reason, read_json, read_metrics
from cvlab.storage import atomic

FILE = "rung.json"
UNITS = ("epoch", "step")  # keys of the rows of metrics.jsonl
Unit = Literal["epoch", "step"]


class Rung(NamedTuple):
    """The rung that a trial may train to.

    Attributes:
        number: 0 for the first rung.
        metric: What trials are compared by.
        unit: What `limit` counts.
        limit: The trial pauses at the first evaluation from there on; None: it trains to its end.
        values: The metric at the rungs below.
    """

    number: int
    metric: str
    unit: Unit
    limit: int | None
    values: tuple[float, ...] = ()

    def is_reached(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row of metrics.jsonl, or its step and epoch, is at the limit or after it."""
        position = row.get(self.unit)
        return self.limit is not None and isinstance(position, (int, float)) and position >= self.limit


def write(run: Path, rung: Rung) -> None:
    """Write the rung that a trial may train to."""
    atomic.write_text(run / FILE, json.dumps(rung._asdict()) + "\n")


def read(run: Path) -> Rung | None:
    """Return the rung that a trial may train to, None if it has no rungs.

    Raises:
        RunDirError: The file is damaged.
    """
    fields = read_json(run / FILE)
    if not fields:
        return None
    try:
        rung = Rung(**fields)
        is_valid = (
            _is_finite(rung.number)
            and isinstance(rung.metric, str)
            and rung.unit in UNITS
            and (rung.limit is None or _is_finite(rung.limit))
            and all(map(_is_finite, rung.values))
        )
    except TypeError:
        is_valid = False
    if not is_valid:
        raise RunDirError(f"{run / FILE}: not the rung of a trial", "the file was changed")
    return rung._replace(values=tuple(rung.values))


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def read_value(run: Path, rung: Rung) -> float | None:
    """Return the metric of a trial at the first evaluation at the limit of a rung or after it; None: not reached."""
    for row in read_metrics(run):
        value = row.get(rung.metric)
        if rung.is_reached(row) and isinstance(value, (int, float)) and math.isfinite(value):
            return value
    return None


def early_end_reason(run: Path) -> str | None:
    """Return why an interrupted run is not to be resumed: it was pruned or waits at a rung. None if it is to be."""
    reason = pruning_reason(run)
    rung = read(run) if reason is None else None
    value = read_value(run, rung) if rung is not None else None
    if rung is None or value is None:
        return reason
    return f"paused at rung {rung.number + 1}, {rung.metric} {value:.4g} after {rung.unit} {rung.limit}"
