"""Labels that all other images contradict: leave-one-out in closed form equals leaving out one image at a time."""

import pytest
import torch
import torch.nn.functional as F

from cvlab.experiments.classification import label_check
from tests.experiments.classification.test_photos import FAST, read_rows, scene_photos


def ridge_prediction(features, targets, image, ridge):
    """Predict the targets of an image by an explicit ridge regression with an intercept."""
    mean, target_mean = features.mean(0), targets.mean(0)
    x = features - mean
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (targets - target_mean))
    return (image - mean) @ weights + target_mean


@pytest.mark.parametrize("shape", [(12, 5), (7, 20)])
def test_leave_one_out_scores_equal_explicit_regressions(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(shape[0]) % 3
    targets = F.one_hot(labels, 3).double()
    monkeypatch.setattr(label_check, "RIDGES", (10.0,))
    singular = torch.linalg.svdvals(features - features.mean(0))
    ridge = 10.0 * float(singular.square().sum()) / len(singular) / 1e3
    expected = []
    for k in range(len(labels)):
        rest = torch.arange(len(labels)) != k
        expected.append(ridge_prediction(features[rest], targets[rest], features[k], ridge))
    scores = label_check.leave_one_out_scores(features, labels, 3)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-6, atol=1e-8)


def test_only_wrong_labels_are_suspicious():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (400,), generator=generator)
    centers = 3 * torch.randn(4, 64, generator=generator)
    features = centers[labels] + torch.randn(400, 64, generator=generator)
    assert label_check.suspicious_labels(features, labels, 4) == []
    wrong = torch.randperm(400, generator=generator)[:20]
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + 1) % 4
    suspicious = label_check.suspicious_labels(features, noisy, 4)
    assert {item.index for item in suspicious} == set(wrong.tolist())
    assert all(item.suggestion == int(labels[item.index]) for item in suspicious)
    assert [item.margin for item in suspicious] == sorted((item.margin for item in suspicious), reverse=True)


def test_two_images_of_a_class_are_not_suspicious():
    features = torch.cat([torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), torch.full((2, 8), 9.0)])
    labels = torch.cat([torch.zeros(20), torch.ones(2)]).long()
    features[20] = features[0]
    assert label_check.suspicious_labels(features, labels, 2) == []


def test_constant_features_and_one_image_per_class():
    assert label_check.suspicious_labels(torch.ones(6, 4), torch.arange(6) % 2, 2) == []
    scores = label_check.leave_one_out_scores(torch.randn(3, 4), torch.arange(3), 3)
    assert scores.isfinite().all()


def test_a_run_lists_photos_with_suspicious_labels(tmp_path, data_root, cvlab):
    scene_photos(tmp_path / "photos", 10, data_root)
    moved = sorted((tmp_path / "photos" / "circle").iterdir())[0]
    moved.rename(tmp_path / "photos" / "square" / "moved.png")
    code, _, err = cvlab("train", "photos", "data.path=photos", "data.val_fraction=0.1", *FAST)
    assert code == 0, err
    (run,) = (tmp_path / "runs").glob("2*")
    rows = read_rows(run / "labels-to-check.csv")
    assert all(row["label"] != row["suggestion"] and float(row["margin"]) >= 0.5 for row in rows)
    split_of = {row["image"]: row["split"] for row in read_rows(run / "photos.csv")}
    assert all(split_of[row["image"]] == "train" for row in rows)
    assert (run / "plots" / "train_suspicious.png").is_file() == bool(rows)
    if rows:
        assert "may be wrong, judging by the other images: labels-to-check.csv" in err
