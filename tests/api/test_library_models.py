"""Detectors and captioners in the Python API: `model()` and `predict()` return what the commands on photos do."""

import numpy as np
import pytest
import torch

import cvlab
from cvlab.data import photos
from cvlab.data.photo_paths import find_images
from cvlab.errors import ConfigError, DataError


@pytest.fixture
def sample():
    """Return the bundled photo."""
    return photos.load(find_images(["sample"])[0])


def test_a_detector(sample):
    keys = {"duration": {"steps": 4}, "batch_size": 4, "views": 1, "expect": [], "finetune_epochs": 0, "threads": 1}
    run = cvlab.train("yolo_scenes", keys)
    model = run.model()
    assert len(model.classes) == 10
    assert not model.training
    model.score_threshold = 0.0
    pixels = photos.to_tensor(sample)
    (output,) = model(pixels[None])
    count = len(output["boxes"])
    assert count > 0
    assert output["boxes"].shape == (count, 4)
    assert output["scores"].shape == output["labels"].shape == (count,)
    assert output["boxes"].max() <= max(sample.size)
    (row,) = model.predict([sample])
    assert [detection["score"] for detection in row["objects"]] == output["scores"].tolist()
    assert (row["width"], row["height"]) == sample.size
    command = cvlab.detect("sample", weights=run)
    assert run.predict("sample")[0]["objects"] == command.results[0]["objects"]
    with pytest.raises(ConfigError, match="has its last weights only"):
        run.model("best")
    (run.path / "detector.safetensors").unlink()
    with pytest.raises(DataError, match="this run has no detector"):
        run.model()


def test_a_captioner(sample):
    keys = {"duration": {"steps": 4}, "expect": [], "log_every": 1, "evaluate_test": False, "threads": 1, "beam": 2}
    run = cvlab.train("caption_scenes", keys)
    command = cvlab.caption("sample", weights=run)
    (row,) = run.predict(sample)
    assert row["sentence"] == command.results[0]["sentence"]
    assert row["score"] == command.results[0]["score"]
    pixels = torch.from_numpy(np.asarray(sample).copy()).permute(2, 0, 1)
    assert run.model()(pixels[None]) == [row["sentence"]]
