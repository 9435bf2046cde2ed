"""PNG plots of a run's curves, and of several runs over each other."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cvlab.reports import curves, metrics
from cvlab.reports.curves import Curve
from cvlab.reports.metrics import MetricInfo
from cvlab.runs.records import read_summary
from cvlab.runs.run_dir import RunDir

DPI = 120


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


def draw(lines: Mapping[str, Curve], y_label: str, title: str, is_fraction: bool = False) -> bytes:
    """Draw curves into one plot, of fractions with the y axis from 0 to 1; return the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=name, linewidth=1.5, marker="o" if len(xs) <= 30 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    if is_fraction:
        axes.set_ylim(0, 1.02)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw_comparison(runs: Mapping[str, Path]) -> bytes:
    """Draw each plotted metric in a panel with the curves of all runs; return the PNG."""
    from matplotlib.figure import Figure

    lines_of_run = {label: curves.read(path) for label, path in runs.items()}
    info = {name: row for path in runs.values() for name, row in read_summary(path).get("metric_info", {}).items()}
    logged = dict.fromkeys(name for lines in lines_of_run.values() for name in lines)
    plotted = {name for names in plotted_families(logged, info).values() for name in names}
    names = [name for name in logged if name in plotted]
    columns = min(2, max(1, len(names)))
    rows = -(-max(1, len(names)) // columns)
    figure = Figure(figsize=(6 * columns, 3.4 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False).flat
    for panel, name in zip(panels, names, strict=False):
        for label, lines in lines_of_run.items():
            if name in lines:
                panel.plot(*lines[name], label=label, linewidth=1.4)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
    for panel in list(panels)[len(names) :]:
        panel.set_visible(False)
    handles = {
        label: line for panel in figure.axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
