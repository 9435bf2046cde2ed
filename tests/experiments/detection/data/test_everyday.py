"""The everyday data set: pseudo-labels beside real boxes, filtered by captions."""

import json

import pytest
import torch
from PIL import Image

from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset, everyday
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample
from cvlab.experiments.detection.data.everyday import PseudoLabel


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two photos of Flickr8k in each split and one of fruit, with labels."""
    (tmp_path / everyday.FLICKR / "Images").mkdir(parents=True)
    labels = {}
    for split in ("train", "dev", "test"):
        names = [f"{split}{k}.webp" for k in range(2)]
        (tmp_path / everyday.FLICKR / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")
        for name in names:
            path = f"{everyday.FLICKR}/Images/{name}"
            Image.new("RGB", (40, 40)).save(tmp_path / path)
            labels[path] = [["dog", 0.6, 1, 1, 20, 20], ["person", 0.3, 2, 2, 30, 39], ["kite", 0.9, 0, 0, 9, 9]]
    fruit = tmp_path / "fruit.png"
    Image.new("RGB", (50, 50)).save(fruit)
    labels["fruit.png"] = [["apple", 0.9, 0, 0, 9, 9], ["person", 0.6, 5, 5, 25, 45]]
    item = DetectionSample(fruit, torch.tensor([[3.0, 3, 30, 30]]), torch.tensor([1]), torch.zeros(1, dtype=torch.bool))
    real = DetectionDataset("fruit", everyday.FRUIT, dict.fromkeys(dataset.SPLITS, (item,)))
    load = dataset.load
    monkeypatch.setattr(dataset, "load", lambda name, *rest: real if name == "fruit" else load(name, *rest))
    lines = [f"{split}{k}.webp,Someone flies a kite ." for split in ("train", "dev", "test") for k in range(2)]
    (tmp_path / everyday.FLICKR / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    (tmp_path / everyday.FOLDER).mkdir()
    (tmp_path / everyday.FOLDER / "boxes.json").write_text(json.dumps(labels))
    return tmp_path


def test_low_confidence_labels_are_in_train_only(root):
    found = everyday.load(root)
    dog, person, banana = (everyday.CLASSES.index(name) for name in ("dog", "person", "banana"))
    first = found.splits["train"][0]
    assert first.labels.tolist() == [person, dog]
    assert first.confidence.tolist() == pytest.approx([0.3, 0.6])
    for split in ("val", "test"):
        assert found.splits[split][0].labels.tolist() == [dog]
    fruit = found.splits["test"][-1]
    assert fruit.labels.tolist() == [banana, person]  # people's fruit, the teacher's persons
    assert fruit.confidence.tolist() == pytest.approx([1.0, 0.6])


def test_fruit_photos_are_repeated_in_train(root):
    found = everyday.load(root)
    assert len(found.splits["train"]) == 2 + everyday.FRUIT_REPEATS
    assert len(found.splits["val"]) == 3


def test_a_photo_without_labels_is_rejected(root):
    path = root / everyday.FOLDER / "boxes.json"
    labels = json.loads(path.read_text())
    del labels[f"{everyday.FLICKR}/Images/dev1.webp"]
    path.write_text(json.dumps(labels))
    with pytest.raises(DataError, match=r"no labels for .*dev1\.webp"):
        everyday.load(root)


class TestFilterPseudoLabels:
    BOXES = (
        PseudoLabel("sheep", 0.3, 0, 0, 10, 10),
        PseudoLabel("dog", 0.15, 1, 0, 11, 10),
        PseudoLabel("cat", 0.05, 30, 0, 40, 10),
    )
    PERSON = PseudoLabel("person", 0.2, 0, 0, 9, 9)

    def test_two_captions_correct_the_class_of_animals(self):
        rows = [*self.BOXES, PseudoLabel("bird", 0.12, 20, 20, 30, 30), self.PERSON]
        found, is_whole = everyday.filter_pseudo_labels(rows, ["Two dogs run .", "A puppy", "Grass"], 0.1)
        assert is_whole
        assert found == [self.PERSON, PseudoLabel("dog", 1.0, 0, 0, 10, 10), PseudoLabel("dog", 1.0, 20, 20, 30, 30)]

    def test_two_captions_confirm_persons(self):
        person, faint = PseudoLabel("person", 0.3, 0, 0, 9, 9), PseudoLabel("person", 0.2, 20, 0, 29, 9)
        found, is_whole = everyday.filter_pseudo_labels(
            [person, faint], ["A man jumps .", "Two kids play", "Water ."], 0.05
        )
        assert is_whole
        assert found == [PseudoLabel("person", 1.0, 0, 0, 9, 9), faint]
        assert everyday.filter_pseudo_labels([person, faint], ["A man jumps .", "Water ."], 0.05)[0] == [person, faint]

    def test_labels_without_a_named_animal_are_incomplete(self):
        found, is_whole = everyday.filter_pseudo_labels([self.PERSON], ["A dog .", "A dog"], 0.1)
        assert found == [self.PERSON]
        assert not is_whole

    def test_without_a_named_animal_only_confident_ones_stay(self):
        rows = [PseudoLabel("dog", 0.4, 0, 0, 9, 9), PseudoLabel("dog", 0.5, 0, 0, 9, 9)]
        assert everyday.filter_pseudo_labels(rows, ["A man ."] * 5, 0.1) == (rows[1:], True)
        assert everyday.filter_pseudo_labels(rows, ["A man .", "A dog ."], 0.1) == (rows, True)

    def test_several_named_animals_keep_the_teacher_s_labels(self):
        found, is_whole = everyday.filter_pseudo_labels(list(self.BOXES), ["A dog and a cat"] * 2, 0.1)
        assert found == list(self.BOXES[:2])
        assert not is_whole
