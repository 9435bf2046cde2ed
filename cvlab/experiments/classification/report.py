"""Write what a classifier gets wrong into a run directory: predictions, scores of the classes, pictures.

For each split: `predictions-SPLIT.csv`, `evaluation-SPLIT.json`, and below `plots/` the confusion matrix, the
reliability diagram and the galleries of mistakes.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cvlab.errors import CvlabError
from cvlab.experiments.classification import drawing, evaluation
from cvlab.experiments.classification.data.images import ImageDataset, Images, to_image
from cvlab.experiments.classification.evaluation import Predictions
from cvlab.experiments.classification.label_check import SuspiciousLabel
from cvlab.reports.images import png
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from PIL import Image

MAX_SUSPICIOUS = 24
LABELS_TO_CHECK = "labels-to-check.csv"


@dataclass(frozen=True)
class Scores:
    """The metrics of splits, and those of their classes by names such as `val_recall/cat`."""

    metrics: dict[str, float]
    class_metrics: dict[str, float]

    def __or__(self, other: "Scores") -> "Scores":
        return Scores(self.metrics | other.metrics, self.class_metrics | other.class_metrics)


def scores(predictions: Predictions, split: str) -> Scores:
    """Return the metrics of predictions; every name is preceded by the split."""
    by_class = zip(predictions.classes, evaluation.class_scores(predictions), strict=True)
    return Scores(
        {f"{split}_{name}": value for name, value in evaluation.metrics(predictions).items()},
        {
            f"{split}_{measure}/{name}": value
            for name, score in by_class
            if score.count
            for measure, value in asdict(score).items()
            if measure != "count"
        },
    )


def write(run: RunDir, predictions: Predictions, metrics: dict[str, float], pixels: Images, split: str) -> None:
    """Write the files about a split; where a picture fails, a warning is logged.

    Args:
        run: The run directory.
        predictions: The predictions.
        metrics: Their metrics, see `scores`.
        pixels: Their images, uint8 (N, H, W, C).
        split: Name of the split.
    """
    chosen = evaluation.suspicious(predictions)[:MAX_SUSPICIOUS]
    temperature = evaluation.best_temperature(predictions.logits, predictions.labels)
    run.write_text(f"predictions-{split}.csv", evaluation.to_csv(predictions))
    run.write_json(f"evaluation-{split}.json", _document(predictions, metrics, chosen, split, temperature))
    run.folder("plots")
    title = f"{split} of {run.path.name}"
    probabilities, labels = predictions.probabilities, predictions.labels
    try:
        confusion = evaluation.confusion_matrix(predictions)
        matrix = drawing.confusion_matrix(confusion, predictions.classes, f"confusion matrix: {title}")
        run.write_bytes(f"plots/{split}_confusion.png", png(matrix))
        error = evaluation.expected_calibration_error(probabilities, labels)
        text = f"expected calibration error {error:.3f}"
        if temperature is not None:
            after = evaluation.expected_calibration_error((predictions.logits / temperature).softmax(1), labels)
            text += f", {after:.3f} if the logits are divided by {temperature:.2f}"
        lines = (f"reliability: {title}", text)
        diagram = drawing.reliability_diagram(*evaluation.reliability(probabilities, labels), lines)
        run.write_bytes(f"plots/{split}_reliability.png", png(diagram))
        galleries = {
            "mistakes": (drawing.largest_losses(predictions), "largest losses"),
            "confused": (drawing.most_confused(predictions), "the pairs of classes that are confused most often"),
            "suspicious": (chosen, "labels that may be wrong: another class is predicted with confidence"),
        }
        for name, (indices, meaning) in galleries.items():
            if indices:
                sheet = drawing.gallery(predictions, pixels, indices, f"{meaning}: {title}")
                run.write_bytes(f"plots/{split}_{name}.png", png(sheet))
    except CvlabError:
        raise
    except Exception as error:  # of a picture; the numbers are written
        run.log(f"warning: the pictures about {split} could not be drawn: {error}")


def _document(
    predictions: Predictions, metrics: dict[str, float], suspicious: list[int], split: str, temperature: float | None
) -> dict[str, Any]:
    return {
        "split": split,
        "images": len(predictions.labels),
        "metrics": metrics,
        "classes": [
            {"class": name, **asdict(score)}
            for name, score in zip(predictions.classes, evaluation.class_scores(predictions), strict=True)
        ],
        "confusion": evaluation.confusion_matrix(predictions).tolist(),
        "temperature": temperature,
        "suspicious_labels": [
            {
                "image": predictions.files[k],
                "label": predictions.classes[int(predictions.labels[k])],
                "prediction": predictions.classes[int(predictions.predicted[k])],
                "probability": float(predictions.probabilities[k].max()),
            }
            for k in suspicious
            if int(predictions.predicted[k]) < len(predictions.classes)
        ],
    }


def write_labels_to_check(
    run: RunDir,
    suspicious: Sequence[SuspiciousLabel],
    files: Sequence[str],
    labels: Sequence[int],
    dataset: ImageDataset,
) -> None:
    """Write the training images whose label all others contradict: a table, and a sheet of the first ones.

    Args:
        run: The run directory.
        suspicious: See `label_check.suspicious_labels`.
        files: Names of the training images.
        labels: Their labels.
        dataset: The data set.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["image", "label", "suggestion", "margin"])
    tiles: list[tuple[str, Image.Image]] = []
    for each in suspicious:
        label, suggestion = dataset.classes[labels[each.index]], dataset.classes[each.suggestion]
        cells = [evaluation.csv_text(text) for text in (files[each.index], label, suggestion)]
        writer.writerow([*cells, f"{each.margin:.3f}"])
        if len(tiles) < MAX_SUSPICIOUS:
            caption = f"labeled {label}, others suggest {suggestion} ({each.margin:.2f}): {files[each.index]}"
            tiles.append((caption, to_image(dataset.train_images, each.index)))
    run.write_text(LABELS_TO_CHECK, out.getvalue())
    if tiles:
        title = f"training labels that all other images contradict: {run.path.name}"
        run.write_bytes("plots/train_suspicious.png", png(drawing.sheet(tiles, title)))
