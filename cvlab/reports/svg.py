"""Charts of curves as inline SVG: axes, lines, and the values for pointers, keyboards and a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cvlab.reports import colors
from cvlab.reports.colors import Style
from cvlab.reports.curves import Curve

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 12, 36
TICKS = 5
MAX_POINTS = 400  # of a line in a page; metrics.jsonl has all of them
MAX_ROWS = 12  # of the table below a chart


@dataclass(frozen=True)
class Line:
    """A curve in a chart: its name, how it is drawn, the points of its polyline, and its values."""

    name: str
    style: Style
    path: str
    xs: list[float]
    ys: list[float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its position in units of the image, and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn, in units of an image of WIDTH x HEIGHT."""

    title: str
    x_name: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_from: float
    x_to: float
    rows: list[tuple[str, list[str]]]  # an x and the value of each line there


def chart(
    title: str, curves: Mapping[str, Curve], styles: Mapping[str, Style] | None = None, x_name: str = "step"
) -> Chart | None:
    """Return a chart of curves, None if none of them has a finite value.

    Args:
        title: What the curves show.
        curves: The curves by name.
        styles: How they are drawn; None: as metrics.
        x_name: What x is; its values are whole numbers.
    """
    styles = styles or colors.of_metrics(curves)
    finite = {name: _finite(curve) for name, curve in curves.items()}
    shown = {name: _thinned(curve) for name, curve in finite.items() if curve[0]}
    if not shown:
        return None
    x_ticks = ticks([x for xs, _ in shown.values() for x in xs], is_whole=True)
    y_ticks = ticks([y for _, ys in shown.values() for y in ys])
    low_x, high_x, low_y, high_y = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def to_px_x(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def to_px_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)

    lines = [
        Line(name, styles[name], " ".join(f"{to_px_x(x)},{to_px_y(y)}" for x, y in zip(xs, ys, strict=True)), xs, ys)
        for name, (xs, ys) in shown.items()
    ]
    return Chart(
        title,
        x_name,
        lines,
        [Tick(to_px_x(x), text(x)) for x in x_ticks],
        [Tick(to_px_y(y), text(y)) for y in y_ticks],
        low_x,
        high_x,
        _rows(shown),
    )


def ticks(values: list[float], is_whole: bool = False) -> list[float]:
    """Return round numbers, at least two, from below the smallest value to above the largest.

    Args:
        values: Numbers on the axis; if all of them are 0, the axis ends at 1.
        is_whole: Whether the numbers are to be whole.
    """
    low, high = min(values), max(values)
    if low == high == 0:
        high = 1.0
    if is_whole and high - low < 1:
        low, high = math.floor(low), math.floor(low) + 1.0
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        spread = abs(high) or 1.0
        low, high = low - spread / 2, high + spread / 2
    raw = (high - low) / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if is_whole and power < 10 else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if raw <= power * factor * (1 + 1e-9))
    step = max(1.0, step) if is_whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def text(value: float) -> str:
    """Format a number for an axis or a table."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(curve: Curve) -> Curve:
    pairs = [(x, y) for x, y in zip(*curve, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _thinned(curve: Curve) -> Curve:
    xs, ys = curve
    stride = -(-len(xs) // MAX_POINTS)
    indices = [*range(0, len(xs) - 1, stride), len(xs) - 1]
    return [xs[k] for k in indices], [ys[k] for k in indices]


def _rows(shown: Mapping[str, Curve]) -> list[tuple[str, list[str]]]:
    """Return the values at a few x, the last one included; a line without a value there shows its latest."""
    all_x = sorted({x for xs, _ in shown.values() for x in xs})
    stride = -(-len(all_x) // MAX_ROWS)
    rows = []
    for row_x in all_x[::-1][::stride][::-1]:
        cells = []
        for xs, ys in shown.values():
            before = [y for x, y in zip(xs, ys, strict=True) if x <= row_x]
            cells.append(text(before[-1]) if before else "")
        rows.append((text(row_x), cells))
    return rows
