"""Plots of a detector's evaluation: precision-recall curves and the confusion matrix."""

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cvlab.ops.average_precision import DetectionMetrics
from cvlab.runs.run_dir import RunDir

DPI = 120
MAX_LEGEND_CLASSES = 20


def write(out: RunDir, metrics: DetectionMetrics, confusion: Tensor, classes: Sequence[str], prefix: str = "") -> None:
    """Write plots/PREFIXprecision_recall.png and plots/PREFIXconfusion.png into a run directory."""
    out.folder("plots")
    out.write_bytes(f"plots/{prefix}precision_recall.png", precision_recall_png(metrics, classes))
    out.write_bytes(f"plots/{prefix}confusion.png", confusion_png(confusion, classes))


def precision_recall_png(metrics: DetectionMetrics, classes: Sequence[str]) -> bytes:
    """Plot precision over recall at IoU 0.5, one curve for each class with ground truth; return the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes: Any = figure.subplots()
    for k, name in enumerate(classes):
        if int(metrics.num_truths[k]):
            label = (
                f"{name} {float(metrics.ap50[k]):.3f} ({int(metrics.num_truths[k])})"
                if k < MAX_LEGEND_CLASSES
                else None
            )
            axes.plot(metrics.recalls[k].numpy(), metrics.precisions[k].numpy(), label=label, linewidth=1.4)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title(f"IoU 0.5: mAP {metrics.map50:.3f}; from 0.5 to 0.95: {metrics.map50_95:.3f}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="class, AP, number of boxes", title_fontsize=8)
    return _png(figure)


def confusion_png(confusion: Tensor, classes: Sequence[str]) -> bytes:
    """Plot a confusion matrix (C + 1, C + 1), a row for each true class, as shares of the row; return the PNG."""
    from matplotlib.figure import Figure

    names = [*classes, "background"]
    side = 2.5 + 0.42 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes: Any = figure.subplots()
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(names) <= MAX_LEGEND_CLASSES + 1:
        for row, counts in enumerate(confusion.tolist()):
            for column, count in enumerate(counts):
                if count:
                    white = float(shares[row, column]) > 0.6
                    text = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if white else "black"}
                    axes.text(column, row, str(count), **text)
    return _png(figure)


def _png(figure: Any) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
