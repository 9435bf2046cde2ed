"""The experiment knn: predictions against a plain loop, cross-validation, the run directory, errors."""

import json

import pytest
import torch

from cvlab.config import loading
from cvlab.errors import ConfigError
from cvlab.experiments.classification import nearest_neighbors as knn
from cvlab.experiments.classification.data.images import ImageDataset

SMALL = ("data={name: scenes10, num_train: 120, num_test: 40}", "ks=[3,1,7]", "folds=4", "expect=[]")


def small_config(*overrides):
    return loading.load("knn", [*SMALL, *overrides]).config


def points(count, seed):
    """Return random vectors, and labels that depend on them."""
    x = torch.rand(count, 12, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] * 3).long()


def plain_predictions(queries, x, labels, k):
    """Return the most frequent label (ties: the lowest) of the k nearest neighbors, using cdist and a sort."""
    nearest = torch.cdist(queries.double(), x.double()).argsort(dim=1, stable=True)[:, :k]
    return torch.stack([torch.bincount(labels[row], minlength=3).argmax() for row in nearest])


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_cross_validation_matches_a_plain_loop(shuffle):
    config = small_config(f"shuffle={shuffle}")
    x, labels = points(50, 0)
    accuracies = knn.cross_validate(config, x, labels, 3, lambda: None)
    assert list(accuracies) == [1, 3, 7]
    if shuffle == "false":
        for k, fold_accuracies in accuracies.items():
            for fold, accuracy in zip(torch.arange(50).tensor_split(4), fold_accuracies, strict=True):
                others = torch.tensor([n for n in range(50) if n not in fold.tolist()])
                predicted = plain_predictions(x[fold], x[others], labels[others], k)
                assert accuracy == (predicted == labels[fold]).double().mean().item()
    else:
        assert accuracies == knn.cross_validate(config, x, labels, 3, lambda: None)
        assert accuracies != knn.cross_validate(small_config("seed=1"), x, labels, 3, lambda: None)


def test_predictions_are_the_majority_with_the_votes_as_probabilities():
    images = torch.randint(0, 256, (30, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))
    dataset = ImageDataset("small", images[:20], labels[:20], images[20:], labels[20:], ("a", "b", "c"))
    x = images.flatten(1).float()
    neighbors = knn.find_neighbors(x[20:], x[:20], 4, lambda: None)
    predictions = knn.predict(neighbors, dataset)
    assert predictions.predicted.equal(plain_predictions(x[20:], x[:20], labels[:20], 4))
    votes = torch.stack([torch.bincount(labels[row], minlength=3) for row in neighbors])
    torch.testing.assert_close(predictions.probabilities, (votes + 1) / 7, rtol=1e-4, atol=1e-4)


def test_a_run_has_metrics_a_curve_over_k_and_images(cvlab, tmp_path):
    code, out, err = cvlab("train", "knn", *SMALL, "--runs-dir", tmp_path, "--json")
    result = json.loads(out)
    assert code == 0, err
    assert result["experiment"] == "knn"
    rows = [json.loads(line) for line in (tmp_path / "latest" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 7]
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert result["metrics"]["k"] == best["step"]
    assert result["metrics"]["val_accuracy"] == pytest.approx(best["val_accuracy"])
    assert 0 <= result["metrics"]["test_accuracy"] <= 1
    assert {"images/neighbors.png", "plots/test_confusion.png", "predictions-test.csv", "report.html"} <= set(
        result["files"]
    )
    code, out, _ = cvlab("resume", tmp_path / "latest", "--json")  # the run has already ended
    assert json.loads(out)["metrics"] == result["metrics"]


def test_an_interrupted_run_starts_again(cvlab, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(knn, "predict", interrupt)
        assert cvlab("train", "knn", *SMALL, "--runs-dir", tmp_path)[0] == 130
    assert cvlab("resume", tmp_path / "latest", "--json")[0] == 0
    assert len((tmp_path / "latest" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ks=[200]", "200 neighbors of 90 images"),
        ("data.num_train=20000", "data.num_train 20000: scenes10 has 12500 images; at most 12500"),
        ("data.num_test=20000", "data.num_test 20000: scenes10 has 2500 images"),
        ("data.name=imagenette", "photos of any size"),
        ("ks=[]", "ks"),
        ("folds=1", "folds"),
        ("precision=bfloat16", "precision"),
    ],
)
def test_invalid_settings_give_a_one_line_error(override, message, cvlab):
    code, _, err = cvlab("train", "knn", *SMALL, override)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_all_images_of_a_smaller_fallback_are_used():
    config = small_config("data={name: scenes10, fallback_for: cifar10, num_train: 50000, num_test: 10000}")
    assert knn._require_enough(config, 12_500, 2_500) == (12_500, 2_500)
    with pytest.raises(ConfigError):
        knn._require_enough(small_config("data={name: cifar10, num_train: 60000}"), 50_000, 10_000)


@pytest.mark.realdata
def test_accuracies_equal_those_of_the_course(cvlab, real_cifar10):
    """CS231n, knn.ipynb: 137 of 500 with k = 1, 139 with k = 5, 141 with k = 10, chosen by cross-validation."""
    for overrides, accuracy in ((("ks=[1]",), 0.274), (("ks=[5]",), 0.278), ((), 0.282)):
        code, out, err = cvlab("train", "knn", *overrides, "--json")
        assert code == 0, err
        assert json.loads(out)["metrics"]["test_accuracy"] == pytest.approx(accuracy)
