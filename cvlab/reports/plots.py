"""PNG plots of a run's curves, and of several runs over each other."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlab.reports import colors, curves, metrics
from cvlab.reports.colors import Style
from cvlab.reports.curves import Curve
from cvlab.reports.metrics import MetricInfo
from cvlab.runs.records import read_summary
from cvlab.runs.run_dir import RunDir

DPI = 120
PADDING = 0.1  # inches around a plot
TITLE_SIZE = 10
MAX_MARKERS = 30  # points of a curve that are marked


def plot_run(out: RunDir) -> list[Path]:
    """Write a plot per family of metrics into a run directory: plots/loss.png, plots/accuracy.png and so on.

    Args:
        out: The run directory; its summary.json declares which metrics are plotted.

    Returns:
        The paths of the plots.
    """
    lines = curves.read(out.path)
    info = read_summary(out.path).get("metric_info", {})
    out.folder("plots")
    paths = []
    for key, names in plotted_families(lines, info).items():
        is_fraction = any(metrics.unit(name, info) == metrics.FRACTION for name in names)
        picture = draw({name: lines[name] for name in names}, metrics.title(key, names), out.path.name, is_fraction)
        out.write_bytes(metrics.file_name(key), picture)
        paths.append(out.path / metrics.file_name(key))
    return paths


def plotted_families(names: Iterable[str], info: MetricInfo) -> dict[str, list[str]]:
    """Return the families of logged metrics that have a plot."""
    families = metrics.group(names)
    return {key: members for key, members in families.items() if metrics.is_plotted(key, members, info)}


def draw(
    lines: Mapping[str, Curve], y_label: str, title: str, is_fraction: bool = False, x_label: str | None = None
) -> bytes:
    """Draw curves of metrics over the step, or over what `x_label` says, into one plot; return the PNG.

    The y axis of fractions is from 0 to 1.
    """
    figure, axes = new_panel(7, 4)
    for name, style in colors.of_metrics(lines).items():
        _plot(axes, lines[name], name, style)
    if x_label is None:
        set_step_axis(axes)
    else:
        axes.set_xlabel(x_label)
    axes.set_ylabel(label(y_label))
    set_value_axis(axes, [y for _, ys in lines.values() for y in ys], is_fraction)
    axes.set_title(label(f"{y_label}: {title}"), fontsize=TITLE_SIZE)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_png(figure)


def draw_comparison(runs: Mapping[str, Path]) -> bytes:
    """Draw each plotted metric in a panel with the curves of all runs; return the PNG."""
    lines_of_run = {label: curves.read(path) for label, path in runs.items()}
    info = {name: row for path in runs.values() for name, row in read_summary(path).get("metric_info", {}).items()}
    logged = dict.fromkeys(name for lines in lines_of_run.values() for name in lines)
    plotted = {name for names in plotted_families(logged, info).values() for name in names}
    names = [name for name in logged if name in plotted]
    columns = min(2, max(1, len(names)))
    rows = -(-max(1, len(names)) // columns)
    figure = new_figure(6 * columns, 3.4 * rows)
    panels: Any = figure.subplots(rows, columns, squeeze=False).flat
    styles = colors.of_series(runs)
    for panel, name in zip(panels, names, strict=False):
        shown = {run: lines[name] for run, lines in lines_of_run.items() if name in lines}
        for run, curve in shown.items():
            _plot(panel, curve, run, styles[run])
        panel.set_title(label(name), fontsize=TITLE_SIZE)
        set_step_axis(panel)
        set_value_axis(panel, [y for _, ys in shown.values() for y in ys], metrics.unit(name, info) == metrics.FRACTION)
        panel.grid(alpha=0.3)
    for panel in list(panels)[len(names) :]:
        panel.set_visible(False)
    handles = {
        text: line for panel in figure.axes for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8
        )
    return to_png(figure)


def draw_lr_range_test(
    rates: Sequence[float], losses: Mapping[str, Sequence[float]], marks: Mapping[str, float], title: str
) -> bytes:
    """Draw losses over the learning rate, on a logarithmic axis; return the PNG.

    Args:
        rates: The learning rates, increasing.
        losses: The losses at these rates by name; the last are those that count.
        marks: Learning rates to mark, by name.
        title: The title.
    """
    figure, axes = new_panel(7, 4)
    styles = colors.of_series([*losses, *marks])
    for name, values in losses.items():
        is_last = name == list(losses)[-1]
        axes.plot(rates, values, label=name, linewidth=2 if is_last else 0.8, **styles[name].line)
    for name, rate in marks.items():
        axes.axvline(rate, label=label(f"{name}: {rate:.2g}"), linewidth=1.2, **styles[name].line)
    shown = sorted(list(losses.values())[-1])
    if shown:
        start, lowest = list(losses.values())[-1][0], shown[0]
        margin = 0.1 * abs(start - lowest) or 0.1
        axes.set_ylim(lowest - 2 * margin, min(shown[-1], start + 5 * abs(start - lowest)) + 2 * margin)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.set_title(label(title), fontsize=TITLE_SIZE)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_png(figure)


def _plot(axes: Any, curve: Curve, name: str, style: Style) -> None:
    marker = "o" if len(curve[0]) <= MAX_MARKERS else None
    axes.plot(*curve, label=label(name), linewidth=1.5, marker=marker, markersize=3, **style.line)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, its size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def new_panel(width: float, height: float) -> tuple[Any, Any]:
    """Return an empty figure, its size in inches, and its only axes, which need no slow layout engine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    return figure, figure.add_axes((0.11, 0.125, 0.87, 0.795))


def to_png(figure: Any) -> bytes:
    """Return a figure as PNG, with no text cut off at its edges."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    from cvlab.reports import fonts

    texts = figure.findobj(Text)
    families = []
    for path in fonts.paths_for("".join(sorted({*"".join(text.get_text() for text in texts)} - {"\n"}))):
        font_manager.fontManager.addfont(path)
        families.append(font_manager.FontProperties(fname=path).get_name())
    for text in texts:
        text.set_fontfamily(families)
    crop: Any = "tight"
    if figure.get_layout_engine() is None:
        crop = figure.get_tightbbox().padded(PADDING)  # "tight" would draw the figure once more
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches=crop)
    return buffer.getvalue()


def label(text: str) -> str:
    """Return a name as text of a plot: nothing in it is a formula, and characters that cannot be drawn are escaped."""
    from cvlab.reports import fonts

    return fonts.printable(text).replace("$", r"\$")


def set_step_axis(axes: Any) -> None:
    """Label the x axis of curves over the step, with whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def set_value_axis(axes: Any, values: Iterable[float], is_fraction: bool) -> None:
    """Set the limits of the y axis: 0 to 1 for fractions and for values that all are 0."""
    if is_fraction or not any(values):
        axes.set_ylim(-0.02, 1.02)
