"""Parallel coordinates of the trials of a sweep as inline SVG: an axis for each key that varies and one for the metric.

Lines are colored by the rank of their metric, the best ones last, on top of the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvlab.reports import svg
from cvlab.reports.svg import Tick
from cvlab.reports.tables import number
from cvlab.runs.records import is_number

WIDTH, HEIGHT = 960, 330
LEFT, RIGHT, TOP, BOTTOM = 70, 70, 34, 16
NUM_COLORS = 8  # classes `v0`, the worst, to `v7` of the style sheet
MAX_AXES, MAX_LINES, MAX_CHOICES = 10, 500, 20
MAX_LABEL = 18  # characters
MAX_MARKS = 6  # values of a key that are all labeled
MIN_GAP = 16.0  # between the labels at the ends of an axis and others


@dataclass(frozen=True)
class Axis:
    """A vertical axis at x: its name, the positions of values, by their text, and its labels."""

    name: str
    x: float
    ticks: list[Tick]


@dataclass(frozen=True)
class TrialLine:
    """A trial: its polyline, the number of its color, what a reader sees of it, and whether it was stopped early."""

    path: str
    color: int
    text: str
    is_stopped: bool


@dataclass(frozen=True)
class ParallelChart:
    """The chart ready to be drawn, in units of an image of WIDTH x HEIGHT; lines from the worst to the best."""

    title: str
    axes: list[Axis]
    lines: list[TrialLine]
    num_missing: int


def chart(trials: Sequence[Any], importance: Mapping[str, Any]) -> ParallelChart | None:
    """Return the chart of the trials in a sweep's summary; None if fewer than two of them have the metric.

    Args:
        trials: Rows with `trial`, `status`, `keys` and `value`; others are ignored.
        importance: The record with `metric`, `goal` and `log_keys`.
    """
    rows = [row for row in trials if isinstance(row, dict) and isinstance(row.get("keys"), dict)]
    measured = [row for row in rows if _is_drawable(row.get("value"))][:MAX_LINES]
    keys = list(dict.fromkeys(key for row in measured for key in row["keys"]))[: MAX_AXES - 1]
    if len(measured) < 2 or not keys:
        return None
    metric, log_keys = str(importance.get("metric", "")), importance.get("log_keys", [])
    sign = -1 if importance.get("goal") == "minimize" else 1
    measured.sort(key=lambda row: sign * row["value"])
    columns = [[row["keys"].get(key) for row in measured] for key in keys] + [[row["value"] for row in measured]]
    axes, heights = [], []
    for k, (name, values) in enumerate(zip([*keys, metric], columns, strict=True)):
        x = LEFT + k * (WIDTH - LEFT - RIGHT) / len(keys)
        ticks, ys = _scale(values, name in log_keys)
        axes.append(Axis(name, round(x, 1), ticks))
        heights.append(ys)
    lines = []
    for k, row in enumerate(measured):
        path = " ".join(f"{axis.x},{ys[k]}" for axis, ys in zip(axes, heights, strict=True))
        parts = [*(f"{key} {_text(row['keys'].get(key))}" for key in keys), f"{metric} {number(row['value'])}"]
        color = k * NUM_COLORS // len(measured)
        is_stopped = row.get("status") == "pruned"
        text = f"{row.get('trial')}: {', '.join(parts)}" + (", stopped early" if is_stopped else "")
        lines.append(TrialLine(path, color, text, is_stopped))
    return ParallelChart(f"{metric} of {len(measured)} trials", axes, lines, len(rows) - len(measured))


def _is_drawable(value: object) -> bool:
    return is_number(value) and abs(value) < 2**63


def _text(value: Any) -> str:
    text = " ".join(map(_text, value)) if isinstance(value, list) else number(value)
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _scale(values: Sequence[Any], is_log: bool) -> tuple[list[Tick], list[float]]:
    """Return the labels of an axis and the height of each value on it."""
    if not all(map(_is_drawable, values)):
        return _choices(values)
    low, high = min(values), max(values)
    transform: Callable[[float], float] = float
    if is_log and 0 < low < high:
        transform = math.log10
        marks = [low, *(10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)), high]
    else:
        marks = svg.ticks(list(values), is_whole=all(isinstance(value, int) for value in values))
    if low < high and len(set(values)) <= MAX_MARKS:  # of a grid
        marks = sorted(set(values))
    first, last = transform(marks[0]), transform(marks[-1])
    positions = [_to_px((transform(mark) - first) / (last - first)) for mark in marks]
    ends = (positions[0], positions[-1])
    ticks = [
        Tick(at, svg.text(mark))
        for mark, at in zip(marks, positions, strict=True)
        if at in ends or all(abs(at - end) >= MIN_GAP for end in ends)
    ]
    return ticks, [_to_px((transform(value) - first) / (last - first)) for value in values]


def _choices(values: Sequence[Any]) -> tuple[list[Tick], list[float]]:
    """Return the labels and heights of values that are no numbers, evenly spaced, in the order of their texts."""
    texts = [str(value) for value in values]
    labels = {text: _text(value) for text, value in zip(texts, values, strict=True)}
    names = sorted(labels)
    shares = {name: (k + 0.5) / len(names) for k, name in enumerate(names)}
    stride = -(-len(names) // MAX_CHOICES)
    return [Tick(_to_px(shares[name]), labels[name]) for name in names[::stride]], [_to_px(shares[t]) for t in texts]


def _to_px(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)
