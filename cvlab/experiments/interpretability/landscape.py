"""The loss landscape of a training run: measured row by row, so that an interrupted run continues, and drawn."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.console import Progress
from cvlab.experiments.common.labeled_classifier import LabeledImages, to_pixels
from cvlab.experiments.interpretability.config import LookConfig
from cvlab.experiments.interpretability.image_sets import evenly_spaced
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import loss_landscape
from cvlab.reports import plots
from cvlab.runs import records
from cvlab.runs.run_dir import RunDir

LOSSES = "losses"  # of a row, in metrics.jsonl
NUM_LEVELS = 24
LOG_RATIO = 20.0  # of the largest loss to the smallest, from which on the levels are logarithmic


def measure(
    config: LookConfig,
    model: PretrainedClassifier,
    split: LabeledImages,
    run: RunDir,
    check_interrupt: Callable[[], None],
) -> Tensor:
    """Return the cross-entropy at each point, float64 (R, R); rows in metrics.jsonl are not measured again.

    Args:
        config: The configuration.
        model: The model; its weights are restored.
        split: The images.
        run: Where each row is written.
        check_interrupt: Called before each point; may raise to stop.
    """
    indices = torch.tensor(evenly_spaced(len(split.labels), config.num_images))
    device = model.module.scale.device
    pixels, labels = split.images(indices), split.labels[indices].to(device)

    rows = [row[LOSSES] for row in records.read_metrics(run.path) if LOSSES in row]
    distances = axis(config)

    def loss() -> float:
        check_interrupt()
        total = 0.0
        for batch, targets in zip(pixels.split(config.batch_size), labels.split(config.batch_size), strict=True):
            logits = model.module(to_pixels(batch.to(device))).float()
            total += float(F.cross_entropy(logits, targets, reduction="sum").double())
        return total / len(labels)

    generator = torch.Generator().manual_seed(config.seed)
    first, second = (
        loss_landscape.random_direction(model.module, lambda shape: torch.randn(shape, generator=generator))
        for _ in range(2)
    )
    with Progress("landscape", len(distances), len(rows)) as progress:
        for row in range(len(rows), len(distances)):
            points = [(a, distances[row]) for a in distances]
            rows.append([])
            for value in loss_landscape.losses_along(model.module, (first, second), points, loss):
                rows[-1].append(value)
                progress.update(row + len(rows[-1]) / len(points), f"loss {value:.3g}")
            run.append({"step": row + 1, LOSSES: rows[-1]})
    return torch.tensor([[math.nan if loss is None else loss for loss in row] for row in rows], dtype=torch.float64)


def axis(config: LookConfig) -> list[float]:
    """Return the distances along a direction, from -radius to radius, with exactly 0 in the middle."""
    half = config.resolution // 2
    return [config.radius * (k - half) / half for k in range(config.resolution)]


def draw(losses: Tensor, distances: Sequence[float], title: str) -> bytes:
    """Draw the losses (R, R) as contours, the weights of the run in the middle; return the PNG."""
    values = losses.numpy()
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    is_log = low > 0 and high > LOG_RATIO * low
    edges = (math.log10(low), math.log10(high)) if is_log else (low, high)
    levels = np.linspace(edges[0], max(edges[1], edges[0] + 1e-9), NUM_LEVELS)
    levels = 10**levels if is_log else levels
    figure, axes = plots.new_panel(6.4, 5.4)
    shown = np.ma.masked_invalid(values)
    norm = None
    if is_log:
        from matplotlib.colors import LogNorm

        norm = LogNorm(low, high)
    filled = axes.contourf(distances, distances, shown, levels=levels, cmap="viridis", norm=norm)
    lines = axes.contour(distances, distances, shown, levels=levels[::3], colors="white", linewidths=0.6)
    digits = 3 if is_log or high <= low else max(3, 2 + math.ceil(math.log10(abs(high) / (high - low))))
    number_format = f"%.{digits}g"  # in which levels of a narrow range differ
    axes.clabel(lines, fontsize=7, fmt=number_format)
    axes.plot(0, 0, marker="+", color="red", markersize=12, markeredgewidth=2)
    axes.set_aspect("equal")
    axes.set_xlabel("direction 1, filter-normalized")
    axes.set_ylabel("direction 2, filter-normalized")
    axes.set_title("\n".join(map(plots.label, title.splitlines())), fontsize=plots.TITLE_SIZE)
    bar = figure.colorbar(filled, ax=axes, format=number_format)
    bar.set_label("cross-entropy")
    return plots.to_png(figure)
