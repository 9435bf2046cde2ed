"""Read curves from metrics.jsonl, thinned while they are read, so that a million rows fit into memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

from cvlab.runs.records import Row, is_number, read_metrics

MAX_POINTS = 2000
MAX_INTEGER = 2**63  # larger ones cannot be drawn
NOT_CURVES = ("step", "epoch", "seconds")
Curve = tuple[list[float], list[float]]


def read(path: Path, x: str = "step") -> dict[str, Curve]:
    """Return for each metric of a run its (x values, y values), at most MAX_POINTS each."""
    return thin(read_metrics(path), x)


def thin(rows: Iterable[Row], x: str = "step") -> dict[str, Curve]:
    """Collect rows into curves; when a curve has twice MAX_POINTS every other point of it is dropped.

    From then on it takes every second row, then every fourth, and so on. The last row is always included.
    """
    curves: dict[str, Curve] = {}
    strides: dict[str, int] = {}
    seen: dict[str, int] = {}
    last: dict[str, tuple[float, float]] = {}
    for row in rows:
        at = row.get(x)
        for name, value in row.items():
            if name in NOT_CURVES or not _is_drawable(value) or not _is_drawable(at):
                continue
            xs, ys = curves.setdefault(name, ([], []))
            count = seen[name] = seen.get(name, -1) + 1
            last[name] = (at, value)
            if count % strides.setdefault(name, 1) == 0:
                xs.append(at)
                ys.append(value)
            if len(xs) >= 2 * MAX_POINTS:
                del xs[1::2], ys[1::2]
                strides[name] *= 2
    for name, (xs, ys) in curves.items():
        if last[name][0] != xs[-1]:
            xs.append(last[name][0])
            ys.append(last[name][1])
    return curves


def _is_drawable(value: object) -> TypeGuard[float]:
    return isinstance(value, float) or (is_number(value) and abs(value) < MAX_INTEGER)
