"""The everyday data set: two sets of photos with COCO's classes, and detections that training ignores."""

import json

import pytest
import torch
from PIL import Image

from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset, everyday
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample

CLASSES = ("person", "kite", "apple", "banana", "orange")


def sample(path, boxes, labels):
    Image.new("RGB", (50, 50)).save(path)
    difficult = torch.zeros(len(labels), dtype=torch.bool)
    return DetectionSample(path, torch.tensor(boxes).view(-1, 4).float(), torch.tensor(labels).long(), difficult)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Write one photo of people and one of fruit, with detections; return the folder."""
    people = sample(tmp_path / "people.png", [[0, 0, 20, 40]], [0])
    fruit = sample(tmp_path / "fruit.png", [[3, 3, 30, 30]], [1])
    val = sample(tmp_path / "val.png", [[0, 0, 9, 9]], [1])
    sets = {
        "coco_people": DetectionDataset("coco_people", CLASSES, {"train": (people,), "val": (val,), "test": (val,)}),
        "fruit": DetectionDataset("fruit", ("apple", "banana", "orange"), {"train": (fruit,), "val": (), "test": ()}),
    }
    load = dataset.load
    monkeypatch.setattr(dataset, "load", lambda name, *rest: sets[name] if name in sets else load(name, *rest))
    rows = {
        "people.png": [["person", 0.9, 1, 1, 20, 40], ["person", 0.4, 30, 0, 50, 40], ["kite", 0.5, 0, 0, 20, 40]],
        "fruit.png": [["person", 0.6, 3, 3, 30, 30], ["apple", 0.5, 5, 5, 5, 25]],
    }
    (tmp_path / everyday.FOLDER).mkdir()
    (tmp_path / everyday.FOLDER / everyday.LABELS_FILE).write_text(json.dumps(rows))
    return tmp_path


def test_detections_in_addition_to_the_boxes_are_ignored(root):
    first = everyday.load(root).splits["train"][0]
    assert first.labels.tolist() == [0, 0, 1]  # the annotated person, another one, a kite at the position of the first
    assert first.difficult.tolist() == [False, True, True]


def test_fruit_has_the_labels_of_coco_and_is_repeated(root):
    train = everyday.load(root).splits["train"]
    assert len(train) == 1 + everyday.FRUIT_REPEATS
    assert train[1].labels.tolist() == [CLASSES.index("banana"), 0]
    assert train[1].difficult.tolist() == [False, True]  # the detection without area is left out


def test_val_and_test_equal_those_of_coco_people(root):
    loaded = everyday.load(root)
    assert loaded.splits["val"][0].difficult.tolist() == [False]
    assert loaded.classes == CLASSES


def test_a_photo_without_detections_is_rejected(root):
    (root / everyday.FOLDER / everyday.LABELS_FILE).write_text('{"people.png": []}')
    with pytest.raises(DataError, match=r"no detections of fruit\.png"):
        everyday.load(root)


def test_detections_are_created_by_the_bundled_detector(root):
    everyday.create(root, None, wait=False)
    rows = json.loads((root / everyday.FOLDER / everyday.LABELS_FILE).read_text())
    assert rows == {"people.png": [], "fruit.png": []}  # black photos
    assert "1 photos" not in everyday.check(root)
