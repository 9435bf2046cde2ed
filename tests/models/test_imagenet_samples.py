"""The default model, and attacks on it, on labeled photos of ImageNet if CVLAB_DATA has them."""

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import REAL_DATA

pytestmark = pytest.mark.realdata
FOLDER = Path(REAL_DATA or "/nowhere") / "imagenet_samples"


@pytest.fixture(scope="module")
def labels():
    if not (FOLDER / "labels.csv").is_file():
        pytest.skip("CVLAB_DATA has no imagenet_samples")
    with (FOLDER / "labels.csv").open() as file:
        return {str(FOLDER / row["file"]): int(row["class_index"]) for row in csv.DictReader(file)}


def test_the_default_model_classifies_most_photos_correctly(cvlab, labels):
    code, out, err = cvlab("classify", FOLDER, "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert len(results) == len(labels)
    is_correct = [labels[row["image"]] == row["class_index"] for row in results]
    is_in_top5 = [labels[row["image"]] in [prediction["class_index"] for prediction in row["top"]] for row in results]
    assert sum(is_correct) >= 0.8 * len(is_correct)
    assert sum(is_in_top5) >= 0.93 * len(is_in_top5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--size", "model"), ("--method", "pgd", "--eps", "8")])
def test_all_attacks_succeed(cvlab, labels, options):
    code, out, err = cvlab("attack", "--target", "ostrich", FOLDER, "--json", *options)
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert metrics["success_rate"] == 1
    assert metrics["steps"] <= 10
    assert metrics["l2"] <= 2.0 or "pgd" in options


def test_some_attacks_succeed(cvlab, labels):
    photos = [path for path, index in labels.items() if index != 9][:3]
    code, out, err = cvlab("attack", "--target", "ostrich", *photos, "--json")
    assert code == 0, err
    assert all(row["success"] for row in json.loads(out)["results"])
