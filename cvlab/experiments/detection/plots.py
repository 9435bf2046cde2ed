"""Plots of a detector's evaluation: precision-recall curves and the confusion matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvlab.ops.average_precision import DetectionMetrics
from cvlab.reports import colors, plots
from cvlab.runs.run_dir import RunDir

MAX_LEGEND_CLASSES = 20
NUM_RECALLS = 101  # at which curves are averaged, as COCO does
BACKGROUND = "background"


def write(out: RunDir, metrics: DetectionMetrics, confusion: Tensor, classes: Sequence[str], prefix: str = "") -> None:
    """Write plots/PREFIXprecision_recall.png and plots/PREFIXconfusion.png into a run directory."""
    out.folder("plots")
    title = f"{prefix.rstrip('_')} of {out.path.name}" if prefix else out.path.name
    out.write_bytes(f"plots/{prefix}precision_recall.png", precision_recall_png(metrics, classes, title))
    out.write_bytes(f"plots/{prefix}confusion.png", confusion_png(confusion, classes, title))


def mean_curve(metrics: DetectionMetrics) -> tuple[Tensor, Tensor]:
    """Return NUM_RECALLS recalls, and the mean precision over the classes with ground truth at each of them.

    The precision of a class at a recall is the highest at that recall or above, and 0 above its highest recall.
    """
    recalls = torch.linspace(0, 1, NUM_RECALLS, dtype=torch.float64)
    curves = [torch.zeros(0, NUM_RECALLS, dtype=torch.float64)]
    for recall, precision, num_truths in zip(
        metrics.recalls, metrics.precisions, metrics.num_truths.tolist(), strict=True
    ):
        if num_truths:
            envelope = precision.double().flip(0).cummax(0).values.flip(0)
            first = torch.searchsorted(recall.double().contiguous(), recalls)
            curves.append(torch.cat([envelope, envelope.new_zeros(1)])[first][None])
    stacked = torch.cat(curves)
    return recalls, stacked.mean(0) if len(stacked) else torch.zeros(NUM_RECALLS, dtype=torch.float64)


def precision_recall_png(metrics: DetectionMetrics, classes: Sequence[str], title: str) -> bytes:
    """Plot precision over recall at IoU 0.5: each class with ground truth, and the mean over them; return the PNG."""
    figure = plots.new_figure(8, 5)
    axes: Any = figure.subplots()
    styles = colors.of_series(classes)
    for k, name in enumerate(classes):
        num_truths = int(metrics.num_truths[k])
        if num_truths:
            label = f"{plots.label(name)}: {float(metrics.ap50[k]):.3f} ({num_truths})"
            axes.plot(
                metrics.recalls[k].numpy(),
                metrics.precisions[k].numpy(),
                label=label if k < MAX_LEGEND_CLASSES else None,
                linewidth=1.3,
                **styles[name].line,
            )
    recalls, precisions = mean_curve(metrics)
    mean_label = f"mean over classes: {metrics.map50:.3f} ({int(metrics.num_truths.sum())})"
    axes.plot(recalls.numpy(), precisions.numpy(), label=mean_label, color="black", linewidth=3)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    scores = f"mAP {metrics.map50:.3f} at IoU 0.5, {metrics.map50_95:.3f} from 0.5 to 0.95"
    axes.set_title(f"precision and recall at IoU 0.5: {plots.label(title)}\n{scores}", fontsize=plots.TITLE_SIZE)
    axes.grid(alpha=0.3)
    figure.legend(
        fontsize=8, title="class: AP (number of boxes)", title_fontsize=8, loc="outside right upper", handlelength=3
    )
    return plots.to_png(figure)


def confusion_png(confusion: Tensor, classes: Sequence[str], title: str) -> bytes:
    """Plot a confusion matrix (C + 1, C + 1), a row for each true class: counts, fractions of each row as colors."""
    names = [plots.label(name) for name in (*classes, BACKGROUND)]
    has_texts = len(names) <= MAX_LEGEND_CLASSES + 1
    side = max(5.0, 2.0 + (0.62 if has_texts else 0.2) * len(names))
    figure = plots.new_figure(side + 1, side)
    axes: Any = figure.subplots()
    fractions = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the true class", shrink=0.7)
    font_size = 10 if has_texts else 6
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=font_size)
    axes.set_yticks(range(len(names)), names, fontsize=font_size)
    axes.set(xlabel="predicted class", ylabel="true class")
    meaning = f"row {BACKGROUND}: detections of no object; column {BACKGROUND}: objects that were missed"
    content = "count and fraction of the true class" if has_texts else "fraction of the true class"
    heading = f"confusion matrix: {plots.label(title)}\n{content}\n{meaning}"
    axes.set_title(heading, fontsize=plots.TITLE_SIZE)
    for row, column in confusion.nonzero().tolist() if has_texts else []:
        fraction = float(fractions[row, column])
        text = f"{int(confusion[row, column])}\n{fraction:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if fraction > 0.6 else "black")
    return plots.to_png(figure)
