"""The saliency command."""

import json
from pathlib import Path

import numpy as np
import pytest

from cvlab.data import photos
from cvlab.experiments.interpretability import comparison, experiments, saliency_methods


@pytest.mark.parametrize("method", ["gradient", "smoothgrad", "integrated_gradients", "gradcam", "layercam"])
def test_saved_files(two_photos, cvlab, tmp_path, method):
    code, out, err = cvlab(
        "saliency", *two_photos, "--method", method, "samples=2", "--class", "9", "--objective", "loss", "--json"
    )
    result = json.loads(out)
    assert code in (0, 3), err
    for row in result["results"]:
        values = np.load(tmp_path / result["run"] / row["values"])
        assert values.shape == (224, 224)
        assert values.min() >= 0
        assert row["label"] == "ostrich"
        for key in ("map", "overlay", "panel"):
            assert photos.load(tmp_path / result["run"] / row[key]).size[0] >= 224
        assert photos.load(tmp_path / result["run"] / row["overlay"]).size == photos.load(Path(row["image"])).size


def test_captum_methods_with_and_without_captum(two_photos, cvlab, tmp_path, monkeypatch):
    pytest.importorskip("captum")
    code, _, err = cvlab("saliency", *two_photos, "--method", "occlusion", "window=0.5")
    assert code in (0, 3), err
    monkeypatch.setattr(experiments, "has_captum", lambda: False)
    num_runs = len(list((tmp_path / "runs").iterdir()))
    code, _, err = cvlab("saliency", two_photos[0], "--method", "occlusion")
    assert code == 2
    assert "occlusion is computed by captum, which is not installed: pip install -e '.[explain]'" in err
    assert len(list((tmp_path / "runs").iterdir())) == num_runs


def test_comparison(two_photos, cvlab, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "has_captum", lambda: False)
    methods = saliency_methods.CAM_METHODS
    monkeypatch.setitem(methods, "scorecam", methods["layercam"])  # which is much faster
    code, out, err = cvlab("saliency", two_photos[0], "--compare", "samples=2", "curve_steps=2", "--json")
    result = json.loads(out)
    assert code in (0, 3), err
    (row,) = result["results"]
    names = ["gradient", "smoothgrad", "integrated_gradients", "gradcam", "layercam", "scorecam", "random"]
    assert [scores["method"] for scores in row["methods"]] == names
    for scores in row["methods"]:
        assert ("randomized" in scores) == (scores["method"] != "random")
        assert -1 <= scores.get("randomized", 0) < 0.95
        for key in {"insertion", "deletion", "randomized"} & scores.keys():
            if key == "randomized":
                assert result["metrics"][f"{key}/{scores['method']}"] == scores[key]
                continue
            assert 0 <= scores[key] <= 1
            assert result["metrics"][f"{key}/{scores['method']}"] == scores[key]
    assert photos.load(tmp_path / result["run"] / row["comparison"]).width > 800
    log = (tmp_path / result["run"] / "log.txt").read_text()
    assert "not compared: method=occlusion: captum is not installed" in log
