"""The comparisons with other libraries return the documented keys; the numbers depend on the machine."""

import json

import torch

from benchmarks import detection, layers, photos
from cvlab.ops.roi_align import roi_align

REFERENCE = """experiment: classify
data: scenes10
model: {name: deep_convnet, filters: [4, 6], pools: [1], batchnorm: true}
optimizer: sgd
batch_size: 4
duration: {steps: 1}
"""


def test_layers(capsys, monkeypatch, tmp_path):
    (tmp_path / "reference.yaml").write_text(REFERENCE)
    monkeypatch.setattr(layers, "REFERENCE", str(tmp_path / "reference.yaml"))
    monkeypatch.setattr(layers, "CAPTIONS", (6, 3, 4, 8, 5, 2))
    layers.main(["--rounds", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert all(row["manual_against_torch"] > 0 and row["torch_seconds"] > 0 for row in rows)
    assert {row["layer"] for row in rows} == {
        "Conv2d",
        "BatchNorm2d",
        "MaxPool2d",
        "ReLU",
        "Linear",
        "RNN",
        "LSTM",
        "AttentionLSTM",
    }


def test_photos_against_bare_loops(capsys, monkeypatch):
    monkeypatch.setattr(photos, "STEPS", 2)
    photos.main(["--rounds", "1", "--batch-size", "1", "--json"])
    loops = {row["loop"]: row for row in json.loads(capsys.readouterr().out)["loops"]}
    assert {"bare gradient", "saliency", "attack, original size, float32"} <= loops.keys()
    assert all(row["seconds"] > 0 for row in loops.values())
    assert loops["bare gradient"]["times_as_fast"] == 1


def test_boxes_against_plain_loops(capsys, monkeypatch):
    monkeypatch.setattr(detection, "NMS_COUNTS", (50,))
    monkeypatch.setattr(detection, "FEATURE_SHAPE", (4, 8, 14, 14))
    monkeypatch.setattr(detection, "NUM_IMAGES", 10)
    detection.main(["--rounds", "1", "--json"])
    rows = {row["loop"]: row for row in json.loads(capsys.readouterr().out)["loops"]}
    assert {"nms of 50 boxes", "a loop over the boxes", "yolo on a photo of 640 x 480"} <= rows.keys()
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["nms of 50 boxes"]["against_ours"] == 1
    assert rows["a loop over the boxes"]["against_ours"] != 1


def test_the_loop_over_boxes_equals_roi_align():
    maps = torch.randn(2, 3, 10, 12, dtype=torch.float64)
    boxes_xyxy = torch.tensor([[1.0, 1, 7, 8], [0, 2, 11, 9], [3, 3, 3.5, 4]]).double()
    image_indices = torch.tensor([1, 0, 1])
    torch.testing.assert_close(
        detection.roi_align_loop(maps, boxes_xyxy, image_indices, 2), roi_align(maps, boxes_xyxy, image_indices, 2)
    )
