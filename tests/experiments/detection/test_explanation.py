"""Pixels that increase the score of a detection: an artificial detector, the command, its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.experiments.common.photo_batches import Photo
from cvlab.experiments.detection import explanation
from cvlab.experiments.detection.inference import LoadedDetector, PhotoDetector
from cvlab.ops.average_precision import Detections
from cvlab.runs.run_dir import RunDir

BOX = (40.0, 20.0, 70.0, 50.0)


def predict(images, score_threshold, nms_iou):
    """Return for each photo a box whose score is the brightness of a spot in it, and one with a constant score."""
    results = []
    for image in images:
        spot = float(np.asarray(image)[30:36, 50:56].mean()) / 255
        scores = torch.tensor([spot, 0.5])
        keep = scores >= score_threshold
        boxes_xyxy = torch.tensor([BOX, (0.0, 0.0, 30.0, 30.0)])
        results.append(Detections(boxes_xyxy[keep], scores[keep], torch.tensor([1, 0])[keep]))
    return results


@pytest.fixture
def photo_detector(tmp_path):
    run = RunDir(tmp_path, lambda text: None)
    run.folder("images")
    return PhotoDetector(LoadedDetector("artificial", ("bird", "lamp"), 0, 100, predict), run, 0.5)


def test_only_the_spot_has_an_effect_on_its_box(photo_detector, monkeypatch):
    maps = []
    draw = explanation.occlusion.draw
    monkeypatch.setattr(
        explanation.occlusion,
        "draw",
        lambda photo, marked, values, *text: maps.append(values) or draw(photo, marked, values, *text),
    )
    photo = Photo(Path("a.jpg"), "a", Image.new("RGB", (100, 80), "white"))
    explainer = explanation.DetectionExplainer(photo_detector, 1, 0.08)
    (result,) = explainer([photo], lambda note="", done=0.0: None)
    values = result.values["explanation"]
    assert (values["number"], values["label"], values["inside_box"]) == (
        1,
        "lamp",
        1.0,
    )
    positions = maps[0].nonzero()
    assert positions.min(0).values.tolist() >= [30 - 7, 50 - 7]
    assert positions.max(0).values.tolist() <= [36 + 7, 56 + 7]
    assert float(maps[0][33, 53]) == float(maps[0].max())
    assert photos.load(photo_detector.out.path / result.files["evidence"]).width > 300
    explanation.DetectionExplainer(photo_detector, 2, 0.5)([photo], lambda note="", done=0.0: None)
    assert not maps[1].any(), "the score of the other box is constant"


def test_match_score():
    detections = Detections(torch.tensor([BOX, BOX]), torch.tensor([0.9, 0.4]), torch.tensor([0, 1]))
    assert float(explanation.match_score(detections, torch.tensor(BOX), 1)) == pytest.approx(0.4)
    half = torch.tensor((40.0, 20.0, 70.0, 35.0))
    assert float(explanation.match_score(detections, half, 0)) == pytest.approx(0.45)
    assert float(explanation.match_score(detections, half, 2)) == 0


def test_the_command_and_a_number_that_does_not_exist(cvlab):
    code, out, err = cvlab("saliency", "sample", "--model", "everyday", "window=0.6", "threads=1", "--json")
    assert code == 0, err
    result = json.loads(out)
    row = result["results"][0]
    assert row["explanation"]["label"] == row["objects"][0]["label"]
    assert photos.load(Path(result["run"]) / row["evidence"]).width > 300
    code, _, err = cvlab("saliency", "sample", "--box", "99", "threads=1")
    assert code == 2
    assert "no detection has number 99" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--box", "1", "--method", "gradcam"), "--method has no effect with --box"),
        (("--box", "1", "--class", "tick"), "--class has no effect with --box"),
        (("--word", "dog", "--compare"), "--compare has no effect with --word"),
        (("--word", "dog", "--box", "1"), "--box and --word are both given"),
        (("--box", "0"), "explain_box"),
        (("--box", "1", "--model", "no-such-run"), "no-such-run"),
    ],
)
def test_errors(cvlab, args, message):
    code, _, err = cvlab("saliency", "sample", *args)
    assert code in (2, 4)
    assert message in err
    assert len(err.strip().splitlines()) == 1
