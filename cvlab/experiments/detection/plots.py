"""Pictures of how good a detector is: precision over recall for each class, and what is taken for what."""

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cvlab.ops.average_precision import DetectionMetrics
from cvlab.runs.run_dir import RunDir

DPI = 120
MOST_CLASSES = 20  # in the legend


def write(out: RunDir, found: DetectionMetrics, confusion: Tensor, classes: Sequence[str], prefix: str = "") -> None:
    """Write plots/precision_recall.png and plots/confusion.png, after a prefix."""
    out.folder("plots")
    out.write_bytes(f"plots/{prefix}precision_recall.png", curves(found, classes))
    out.write_bytes(f"plots/{prefix}confusion.png", table(confusion, classes))


def curves(found: DetectionMetrics, classes: Sequence[str]) -> bytes:
    """Draw precision over recall at IoU 0.5, a line for each class that the set has; return the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes: Any = figure.subplots()
    for k, name in enumerate(classes):
        if int(found.num_truths[k]):
            label = f"{name} {float(found.ap50[k]):.3f} ({int(found.num_truths[k])})" if k < MOST_CLASSES else None
            axes.plot(found.recalls[k].numpy(), found.precisions[k].numpy(), label=label, linewidth=1.4)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title(f"IoU 0.5: mAP {found.map50:.3f}; from 0.5 to 0.95: {found.map50_95:.3f}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="class, AP, number of boxes", title_fontsize=8)
    return _png(figure)


def table(confusion: Tensor, classes: Sequence[str]) -> bytes:
    """Draw a table (C + 1, C + 1) of truths down and detections across, as shares of each row; return the PNG."""
    from matplotlib.figure import Figure

    names = [*classes, "nothing"]
    side = 2.5 + 0.42 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes: Any = figure.subplots()
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="found", ylabel="there")
    if len(names) <= MOST_CLASSES + 1:
        for row, counts in enumerate(confusion.tolist()):
            for column, count in enumerate(counts):
                if count:
                    white = float(shares[row, column]) > 0.6
                    text = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if white else "black"}
                    axes.text(column, row, str(count), **text)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
