"""The colors of curves, the same in plots and on pages, on a light and on a dark background.

The colors of metrics: train blue, val orange, test green, whatever the chart; metrics of no split take the other
colors. A second metric of a color is dashed. Runs, settings and classes take the colors in order.
"""

from collections.abc import Iterable
from typing import NamedTuple

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#a8519c", "#b8860b", "#2f9fd8", "#6b6b6b", "#c2185b")
DARK = ("#56b4e9", "#ff9a4d", "#3ddbaa", "#e29ad8", "#e6c84c", "#9ad4f5", "#b5b5b5", "#ff80ab")
SPLITS = {"train": 0, "val": 1, "test": 2}  # prefix of a metric's name -> number of its color
DASHES = ((), (6, 3), (2, 3), (8, 3, 2, 3))  # lengths of strokes and gaps, in line widths


class Style(NamedTuple):
    """How a curve is drawn: the number of its color, and of its dashes."""

    color: int
    dash: int

    @property
    def line(self) -> dict[str, object]:
        """Arguments of matplotlib's `plot`."""
        dash = DASHES[self.dash]
        return {"color": LIGHT[self.color], "linestyle": (0, dash) if dash else "-"}


def of_metrics(names: Iterable[str]) -> dict[str, Style]:
    """Return the style of each metric of a chart.

    Args:
        names: The metrics that are drawn together.
    """
    others = [number for number in range(len(LIGHT)) if number not in SPLITS.values()]
    styles: dict[str, Style] = {}
    num_others = 0
    for name in names:
        number = SPLITS.get(name.removeprefix("best_").partition("_")[0])
        if number is None:
            number = others[num_others % len(others)]
            num_others += 1
        used = sum(style.color == number for style in styles.values())
        styles[name] = Style(number, used % len(DASHES))
    return styles


def of_series(names: Iterable[str]) -> dict[str, Style]:
    """Return the style of each run, setting or class: all colors in order, then all of them dashed."""
    return {name: Style(k % len(LIGHT), k // len(LIGHT) % len(DASHES)) for k, name in enumerate(dict.fromkeys(names))}
