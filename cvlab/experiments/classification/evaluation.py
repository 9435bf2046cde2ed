"""What a trained classifier gets wrong: its predictions, and the numbers that are made of them.

Predictions are computed in float32 with the normalization that the run has, exactly as `cvlab classify --model RUN`
computes them, whatever the precision of the training.

References:
    Guo et al., 2017, "On calibration of modern neural networks" (expected calibration error, temperature scaling);
    Northcutt et al., 2021, "Confident learning", section 3 (labels that are probably wrong).
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.distributed import collectives
from cvlab.engine.device import ComputeContext
from cvlab.experiments.classification.data.augment import tta_views
from cvlab.experiments.classification.data.images import Images, Normalization, eval_batches

NUM_TOP = 5  # classes of a prediction in the CSV
NUM_BINS = 15  # of the reliability diagram
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Predictions:
    """The logits of N images and their labels.

    Attributes:
        logits: float32 (N, C).
        labels: int64 (N,).
        classes: Names of the C classes.
        files: Names of the images' files, or their indices in the split.
        tta_logits: Logits averaged over the views of test-time augmentation, or None.
    """

    logits: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    files: tuple[str, ...]
    tta_logits: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """The softmax (N, C)."""
        return self.logits.softmax(1)

    @property
    def predicted(self) -> Tensor:
        """The most likely class of each image, int64 (N,)."""
        return self.logits.argmax(1)

    @property
    def losses(self) -> Tensor:
        """The cross-entropy of each image, (N,)."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Images,
    labels: Tensor,
    normalize: Normalization,
    ctx: ComputeContext,
    classes: tuple[str, ...],
    files: Sequence[str] = (),
    tta: str = "none",
    batch_size: int | None = None,
) -> Predictions:
    """Compute the logits of images (N, H, W, C) in float32; of several ranks each computes its share.

    `batch_size` is by default `images.default_eval_batch_size`.
    """
    was_training = model.training
    model.eval()
    in_float32 = Normalization(normalize.scale.float(), normalize.shift.float())
    dtype = next(model.parameters()).dtype
    logits, averaged = [], []
    for batch, _ in eval_batches(images, labels, in_float32, batch_size):
        batch = batch.to(ctx.device, dtype)
        views = [] if tta == "none" else tta_views(batch, tta)
        logits.append(model(batch.clone() if views else batch).float())  # a model may change its input in place
        if views:
            averaged.append(torch.stack([weight * model(view.clone()).float() for weight, view in views]).sum(0))
    model.train(was_training)
    return Predictions(
        collectives.all_gather_cat(torch.cat(logits)).cpu(),
        labels.cpu(),
        classes,
        tuple(files) or tuple(map(str, range(len(labels)))),
        collectives.all_gather_cat(torch.cat(averaged)).cpu() if averaged else None,
    )


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of one class, 0 where undefined, and its number of images."""

    precision: float
    recall: float
    f1: float
    count: int


def metrics(predictions: Predictions) -> dict[str, float]:
    """Return accuracy, loss, top-5 accuracy (of more than five classes), macro F1 and calibration error."""
    labels, logits = predictions.labels, predictions.logits
    values = {
        "loss": float(predictions.losses.mean()),
        "accuracy": float((predictions.predicted == labels).double().mean()),
    }
    if logits.shape[1] > NUM_TOP:
        top = logits.topk(NUM_TOP, 1).indices
        values["top5_accuracy"] = float((top == labels[:, None]).any(1).double().mean())
    scores = [score for score in class_scores(predictions) if score.count]
    values["macro_f1"] = sum(score.f1 for score in scores) / len(scores)
    values["ece"] = expected_calibration_error(predictions.probabilities, labels)
    if predictions.tta_logits is not None:
        values["accuracy_tta"] = float((predictions.tta_logits.argmax(1) == labels).double().mean())
    return values


def confusion_matrix(predictions: Predictions) -> Tensor:
    """Return counts (C, C): a row for each true class, a column for each predicted one."""
    num_classes = len(predictions.classes)
    flat = predictions.labels * num_classes + predictions.predicted.clamp(max=num_classes - 1)
    return torch.bincount(flat, minlength=num_classes**2).view(num_classes, num_classes)


def class_scores(predictions: Predictions) -> list[ClassScores]:
    """Return precision, recall and F1 of each class."""
    confusion = confusion_matrix(predictions)
    hits, truths, guesses = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    scores = []
    for hit, truth, guess in zip(hits, truths, guesses, strict=True):
        precision, recall = hit / max(guess, 1), hit / max(truth, 1)
        scores.append(ClassScores(precision, recall, 2 * hit / max(truth + guess, 1), truth))
    return scores


def reliability(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean confidence, accuracy and number of images in each of NUM_BINS equal bins of the confidence."""
    confidence, predicted = probabilities.double().max(1)
    bins = (confidence * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
    counts = torch.bincount(bins, minlength=NUM_BINS)
    sums = [
        torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bins, x)
        for x in (confidence, (predicted == labels).double())
    ]
    mean_confidence, accuracy = (x / counts.clamp(min=1) for x in sums)
    return mean_confidence, accuracy, counts


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean over images of |accuracy - confidence| of their bins (Guo et al., 2017, equation 3)."""
    confidence, accuracy, counts = reliability(probabilities, labels)
    return float(((confidence - accuracy).abs() * counts).sum() / counts.sum())


def best_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature T that minimizes the cross-entropy of logits / T (Guo et al., 2017, section 4.2).

    The cross-entropy is convex in 1 / T, so its derivative has one root, which is found by bisection. None if every
    prediction is correct: the cross-entropy then has no minimum.
    """
    if bool((logits.argmax(1) == labels).all()):
        return None
    logits = logits.double()

    def slope(inverse: float) -> float:
        """Return the derivative of the mean cross-entropy with respect to 1 / T."""
        expected = ((logits * inverse).softmax(1) * logits).sum(1)
        return float((expected - logits.gather(1, labels[:, None])[:, 0]).mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def suspicious(predictions: Predictions) -> list[int]:
    """Return the images whose label is probably wrong, the most suspicious first.

    An image counts if its probability of another class is at least the mean probability of that class over the images
    that are labeled so (confident learning), and it is not predicted as labeled.
    """
    probabilities, labels = predictions.probabilities, predictions.labels
    num_classes = probabilities.shape[1]
    counts = torch.bincount(labels, minlength=num_classes)
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    thresholds = torch.zeros(num_classes).index_add_(0, labels, of_label) / counts.clamp(min=1)
    thresholds[counts == 0] = 1.0
    predicted = predictions.predicted
    score, is_incorrect = probabilities.max(1).values, predicted != labels
    chosen = (is_incorrect & (score >= thresholds[predicted])).nonzero()[:, 0]
    ranked: list[int] = chosen[(score - of_label)[chosen].argsort(descending=True, stable=True)].tolist()
    return ranked


def to_csv(predictions: Predictions) -> str:
    """Return a line for each image: file, label, prediction, the most likely classes with probabilities, loss."""
    count = min(NUM_TOP, predictions.logits.shape[1])
    probabilities, classes = predictions.probabilities.topk(count, 1)
    names = [
        *predictions.classes,
        *(f"class {k}" for k in range(len(predictions.classes), predictions.logits.shape[1])),
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tops = [column for k in range(1, count + 1) for column in (f"class_{k}", f"probability_{k}")]
    writer.writerow(["image", "label", "prediction", "correct", *tops, "loss"])
    rows = zip(
        predictions.files,
        predictions.labels.tolist(),
        classes.tolist(),
        probabilities.tolist(),
        predictions.losses.tolist(),
        strict=True,
    )
    for file, label, top, scores, loss in rows:
        pairs: list[Any] = [
            value for k, score in zip(top, scores, strict=True) for value in (csv_text(names[k]), f"{score:.6f}")
        ]
        is_correct = int(top[0] == label)
        writer.writerow(
            [csv_text(file), csv_text(names[label]), csv_text(names[top[0]]), is_correct, *pairs, f"{loss:.6f}"]
        )
    return out.getvalue()


def csv_text(text: str) -> str:
    """Return a name as a cell that no spreadsheet takes as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
