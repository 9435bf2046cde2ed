"""Write what a classifier gets wrong into a run directory: predictions, scores of the classes, pictures.

For each split: `predictions-SPLIT.csv`, `evaluation-SPLIT.json`, and below `plots/` the confusion matrix, the
reliability diagram and the galleries of mistakes.
"""

from dataclasses import asdict, dataclass
from typing import Any

from cvlab.errors import CvlabError
from cvlab.experiments.classification import drawing, evaluation
from cvlab.experiments.classification.data.images import Images
from cvlab.experiments.classification.evaluation import Predictions
from cvlab.reports.images import png
from cvlab.runs.run_dir import RunDir

MAX_SUSPICIOUS = 24


@dataclass(frozen=True)
class SplitReport:
    """The metrics of a split, and those of its classes by names such as `recall/cat`."""

    metrics: dict[str, float]
    class_metrics: dict[str, float]


def scores(predictions: Predictions, split: str) -> SplitReport:
    """Return the metrics of predictions; every name is preceded by the split."""
    by_class = zip(predictions.classes, evaluation.class_scores(predictions), strict=True)
    return SplitReport(
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
