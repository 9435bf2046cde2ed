"""Metrics of predictions against torchmetrics and plain loops."""

import csv
import io

import pytest
import torch

from cvlab import _compat
from cvlab.experiments.classification import drawing, evaluation
from cvlab.experiments.classification.evaluation import Predictions

_compat.torchvision()
classification = pytest.importorskip("torchmetrics.functional.classification")


def random_predictions(num_images=300, num_classes=7, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    logits = scale * torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += scale
    names = tuple(f"class {k}" for k in range(num_classes))
    return Predictions(logits, labels, names, tuple(map(str, range(num_images))))


@pytest.mark.parametrize("num_classes", [2, 7, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_match_torchmetrics(num_classes, seed):
    predictions = random_predictions(num_classes=num_classes, seed=seed)
    labels, probabilities = predictions.labels, predictions.probabilities
    arguments = {"num_classes": num_classes, "average": None}
    scores = evaluation.class_scores(predictions)
    for name in ("precision", "recall", "f1"):
        compute = getattr(classification, f"multiclass_{name}{'_score' if name == 'f1' else ''}")
        expected = compute(probabilities, labels, **arguments)
        assert torch.allclose(torch.tensor([getattr(score, name) for score in scores]), expected)
    confusion = classification.multiclass_confusion_matrix(probabilities, labels, num_classes)
    assert torch.equal(evaluation.confusion_matrix(predictions), confusion)
    ece = classification.multiclass_calibration_error(probabilities, labels, num_classes, n_bins=evaluation.NUM_BINS)
    values = evaluation.metrics(predictions)
    assert values["ece"] == pytest.approx(float(ece), abs=1e-5)
    macro = classification.multiclass_f1_score(probabilities, labels, num_classes, average="macro")
    assert values["macro_f1"] == pytest.approx(float(macro), abs=1e-6)
    if num_classes > 5:
        top5 = classification.multiclass_accuracy(probabilities, labels, num_classes, average="micro", top_k=5)
        assert values["top5_accuracy"] == pytest.approx(float(top5))
    else:
        assert "top5_accuracy" not in values


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_best_temperature_minimizes_the_loss(temperature):
    predictions = random_predictions(2000)
    logits = predictions.logits / evaluation.best_temperature(predictions.logits, predictions.labels)
    recovered = evaluation.best_temperature(logits * temperature, predictions.labels)
    assert recovered == pytest.approx(temperature, rel=1e-3)
    grid = torch.linspace(0.5, 2, 301) * recovered
    losses = [torch.nn.functional.cross_entropy(logits * temperature / t, predictions.labels) for t in grid]
    assert float(grid[int(torch.stack(losses).argmin())]) == pytest.approx(recovered, rel=0.01)


def test_without_mistakes_there_is_no_temperature():
    predictions = random_predictions()
    assert evaluation.best_temperature(predictions.logits, predictions.predicted) is None


def test_swapped_labels_are_suspicious():
    predictions = random_predictions(scale=6.0)
    labels = predictions.labels.clone()
    correct = (predictions.predicted == labels).nonzero()[:, 0]
    swapped = correct[[3, 50, 120]]
    labels[swapped] = (labels[swapped] + 1) % 7
    changed = Predictions(predictions.logits, labels, predictions.classes, predictions.files)
    assert set(swapped.tolist()) <= set(evaluation.suspicious(changed))
    assert not set(swapped.tolist()) & set(evaluation.suspicious(predictions))


def test_the_csv_file_has_a_row_for_each_image():
    predictions = random_predictions(20)
    text = evaluation.to_csv(predictions)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["image"] for row in rows] == list(predictions.files)
    for k, row in enumerate(rows):
        assert row["label"] == predictions.classes[predictions.labels[k]]
        assert row["prediction"] == row["class_1"] == predictions.classes[predictions.predicted[k]]
        assert float(row["probability_1"]) == pytest.approx(float(predictions.probabilities[k].max()), abs=1e-6)
        assert float(row["loss"]) == pytest.approx(float(predictions.losses[k]), abs=1e-5)
        assert row["correct"] == str(int(row["label"] == row["prediction"]))


def test_names_are_not_formulas_in_a_spreadsheet():
    predictions = random_predictions(3, 2)
    odd = Predictions(predictions.logits, predictions.labels, ("=1+1", "@x"), ("-a.jpg", "+b,c.jpg", 'd".jpg'))
    rows = list(csv.DictReader(io.StringIO(evaluation.to_csv(odd))))
    assert [row["image"] for row in rows] == ["'-a.jpg", "'+b,c.jpg", 'd".jpg']
    assert {row["prediction"] for row in rows} <= {"'=1+1", "'@x"}


@pytest.mark.usefixtures("drawn_plots")
@pytest.mark.parametrize("num_classes", [2, 9, 40])
def test_plots_of_any_number_of_classes(num_classes):
    predictions = random_predictions(num_classes=num_classes)
    pixels = torch.randint(0, 256, (300, 16, 16, 3), dtype=torch.uint8)
    confusion = evaluation.confusion_matrix(predictions)
    matrix = drawing.confusion_matrix(confusion, [f"ein sehr langer Name {k}" for k in range(num_classes)], "title")
    diagram = drawing.reliability_diagram(*evaluation.reliability(predictions.probabilities, predictions.labels), "ab")
    indices = drawing.largest_losses(predictions)
    sheet = drawing.gallery(predictions, pixels, indices, "largest losses")
    assert min(*matrix.size, *diagram.size, *sheet.size) > 200
    losses = predictions.losses[indices]
    assert torch.equal(losses, losses.sort(descending=True).values)
    assert all(
        predictions.predicted[k] != predictions.labels[k] for k in [*indices, *drawing.most_confused(predictions)]
    )
