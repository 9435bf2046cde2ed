"""Labels of training images that are probably wrong: what all other images say of each, by leave-one-out.

A ridge regression of the classes on features of a frozen backbone has its leave-one-out predictions in closed form, so
that no image takes part in its own prediction and none is trained twice.

References:
    Hastie et al., 2009, "The Elements of Statistical Learning", section 7.10 (leave-one-out of linear fits);
    Northcutt et al., 2021, "Confident learning: estimating uncertainty in dataset labels".
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_MARGIN = 0.5  # of the scores of two classes, each of which is about 1 where the class is certain and 0 where not
MAX_IMAGES = 20_000  # whose decomposition takes half a minute
MIN_IMAGES = 3  # of a class; of fewer, those that remain say too little
RIDGES = tuple(10.0**power for power in range(-2, 6))


@dataclass(frozen=True)
class SuspiciousLabel:
    """An image whose label the others contradict: its index, the class that they suggest, and by how much."""

    index: int
    suggestion: int
    margin: float


def leave_one_out_scores(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Predict the class of each image from all other images.

    Args:
        features: (N, F).
        labels: int64 (N,).
        num_classes: C.

    Returns:
        Scores, float64 (N, C): the ridge regression's prediction of the one-hot label. The ridge is the one with the
        smallest squared error of these predictions.
    """
    targets = F.one_hot(labels, num_classes).double()
    count, mean = len(labels), targets.mean(0)
    u, s, _ = torch.linalg.svd(features.double() - features.double().mean(0), full_matrices=False)
    scale = float(s.square().sum()) / max(len(s), 1) / 1e3 + 1e-12
    projected = u.T @ (targets - mean)
    best, best_error = targets, float("inf")
    for ridge in RIDGES:
        shrinkage = s.square() / (s.square() + ridge * scale)
        leverage = 1 / count + (u.square() * shrinkage).sum(1)
        residual = targets - mean - u @ (shrinkage[:, None] * projected)
        scores = targets - residual / (1 - leverage).clamp(min=1e-9)[:, None]
        error = float((scores - targets).square().mean())
        if error < best_error:
            best, best_error = scores, error
    return best


def suspicious_labels(features: Tensor, labels: Tensor, num_classes: int) -> list[SuspiciousLabel]:
    """Return the images whose label all others contradict, those first that they contradict most.

    Args:
        features: (N, F).
        labels: int64 (N,).
        num_classes: C.
    """
    scores = leave_one_out_scores(features, labels, num_classes)
    predicted = scores.argmax(1)
    margins = scores.max(1).values - scores.gather(1, labels[:, None])[:, 0]
    counts = torch.bincount(labels, minlength=num_classes)
    is_incorrect = (predicted != labels) & (margins >= MIN_MARGIN) & (counts[labels] >= MIN_IMAGES)
    indices = is_incorrect.nonzero()[:, 0].tolist()
    suspicious = [SuspiciousLabel(k, int(predicted[k]), float(margins[k])) for k in indices]
    return sorted(suspicious, key=lambda label: -label.margin)
