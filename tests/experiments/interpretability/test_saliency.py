"""The saliency command."""

import json
from pathlib import Path

import numpy as np
import pytest

from cvlab.data import photos


@pytest.mark.parametrize("method", ["gradient", "smoothgrad", "integrated_gradients", "gradcam"])
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
