"""PNG plots of a run's curves, and of several runs over each other."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvlab.reports import curves
from cvlab.reports.curves import Curve
from cvlab.runs.run_dir import RunDir

FAMILIES = {"loss": "loss", "accuracy": "accuracy", "lr": "learning rate"}  # the end of a metric's name -> its plot
DPI = 120


def family(metric: str) -> str | None:
    """Return the plot that a metric belongs to."""
    for ending in FAMILIES:
        if metric == ending or metric.endswith(f"_{ending}"):
            return ending
    return None


def plot_run(out: RunDir) -> list[Path]:
    """Write plots/loss.png, plots/accuracy.png and so on, one per family of metrics; return their paths."""
    found = curves.read(out.path)
    grouped: dict[str, dict[str, Curve]] = {}
    for name, curve in found.items():
        key = family(name)
        if key is not None:
            grouped.setdefault(key, {})[name] = curve
    folder = out.folder("plots")
    paths = []
    for key, lines in grouped.items():
        path = folder / f"{key}.png"
        out.write_bytes(f"plots/{key}.png", draw(lines, FAMILIES[key], out.path.name))
        paths.append(path)
    return paths


def draw(lines: Mapping[str, Curve], y_label: str, title: str) -> bytes:
    """Draw curves into one picture; return the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=name, linewidth=1.5, marker="o" if len(xs) <= 30 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    if y_label == FAMILIES["accuracy"]:
        axes.set_ylim(0, 1.02)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw_comparison(runs: Mapping[str, Path]) -> bytes:
    """Draw each metric that at least one of the runs has, all runs in one panel; return the PNG."""
    from matplotlib.figure import Figure

    found = {label: curves.read(path) for label, path in runs.items()}
    metrics = [name for name in dict.fromkeys(m for lines in found.values() for m in lines) if family(name)]
    columns = min(2, max(1, len(metrics)))
    rows = -(-max(1, len(metrics)) // columns)
    figure = Figure(figsize=(6 * columns, 3.4 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False).flat
    for panel, metric in zip(panels, metrics, strict=False):
        for label, lines in found.items():
            if metric in lines:
                panel.plot(*lines[metric], label=label, linewidth=1.4)
        panel.set_title(metric, fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
    for panel in list(panels)[len(metrics) :]:
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
