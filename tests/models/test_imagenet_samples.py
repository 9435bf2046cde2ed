"""Photos of ImageNet with their classes, where CVLAB_DATA has them: the default net, and the attacks on it."""

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import REAL_DATA

pytestmark = pytest.mark.realdata
FOLDER = Path(REAL_DATA or "/nowhere") / "imagenet_samples"


@pytest.fixture(scope="module")
def labeled():
    if not (FOLDER / "labels.csv").is_file():
        pytest.skip("CVLAB_DATA has no imagenet_samples")
    with (FOLDER / "labels.csv").open() as file:
        return {str(FOLDER / row["file"]): int(row["class_index"]) for row in csv.DictReader(file)}


def test_the_default_net_knows_most(cvlab, labeled):
    code, out, err = cvlab("classify", FOLDER, "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert len(results) == len(labeled)
    right = [labeled[row["image"]] == row["class_index"] for row in results]
    top5 = [labeled[row["image"]] in [found["class_index"] for found in row["top"]] for row in results]
    assert sum(right) >= 0.8 * len(right)
    assert sum(top5) >= 0.93 * len(top5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--size", "model"), ("--method", "pgd", "--eps", "8")])
def test_all_attacks_succeed(cvlab, labeled, options):
    code, out, err = cvlab("attack", "--target", "ostrich", FOLDER, "--json", *options)
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert metrics["success_rate"] == 1
    assert metrics["steps"] <= 10
    assert metrics["l2"] <= 2.0 or "pgd" in options


def test_some_attacks_succeed(cvlab, labeled):
    some = [path for path, index in labeled.items() if index != 9][:3]
    code, out, err = cvlab("attack", "--target", "ostrich", *some, "--json")
    assert code == 0, err
    assert all(row["success"] for row in json.loads(out)["results"])
