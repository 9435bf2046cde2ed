"""Sentences of photos: words and their numbers, the readers, the built-in scenes."""

import json

import pytest
import torch
from PIL import Image

from cvlab.data import captions, photos, vocabulary
from cvlab.data.scenes import generator
from cvlab.data.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.captioning import dataset, scene_captions

COUNTS = {"train": 6, "val": 2, "test": 2}


class TestVocabulary:
    def test_words_of_a_sentence(self):
        assert vocabulary.tokenize("A dog 's  ball , 2 cats .") == ["a", "dog", "'s", "ball", "2", "cats"]

    def test_the_most_frequent_come_first_and_rare_ones_are_unknown(self):
        made = vocabulary.build_vocabulary([["b", "a", "b"], ["a", "c", "b"]], 2)
        assert made.words == ("b", "a")
        assert len(made) == 6
        rows = made.encode([["a", "c"], ["b"] * 9], 5)
        assert rows.tolist() == [[START, 5, UNKNOWN, END, PAD], [START, 4, 4, 4, END]]
        assert made.decode(rows[0].tolist()) == ["a", "<unk>"]
        assert made.encode([], 5).shape == (0, 5)

    def test_none_is_frequent_enough(self):
        with pytest.raises(DataError, match="no word occurs 3 times"):
            vocabulary.build_vocabulary([["a", "b"]], 3)

    @pytest.mark.parametrize("words", [("a", "a"), ("",), ("<end>",)])
    def test_broken(self, words):
        with pytest.raises(DataError):
            Vocabulary(words)


class TestReaders:
    def test_csv_with_commas_and_quotes(self, tmp_path):
        path = tmp_path / "c.csv"
        path.write_text('image,caption\na.jpg,"A dog, ""big"" ."\nb.jpg,Two\n\na.jpg,Again\n')
        assert captions.read_csv(path) == {"a.jpg": ['A dog, "big" .', "Again"], "b.jpg": ["Two"]}

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("picture,text\na,b\n", r"c\.csv:1: not a table"),
            ("image,caption\na.jpg\n", r"c\.csv:2: needs"),
            ("image,caption\na.jpg,x\nb.jpg, \n", r"c\.csv:3: needs"),
            ("image,caption\n", "no caption in it"),
        ],
    )
    def test_broken_csv_is_named_with_its_line(self, tmp_path, text, says):
        path = tmp_path / "c.csv"
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            captions.read_csv(path)

    def test_coco(self, tmp_path):
        path = tmp_path / "c.json"
        told = {
            "images": [{"id": 7, "file_name": "x.jpg"}],
            "annotations": [{"image_id": 7, "caption": " A cat. "}, {"image_id": 7, "caption": "One cat"}],
        }
        path.write_text(json.dumps(told))
        assert captions.read_coco(path) == {"x.jpg": ["A cat.", "One cat"]}
        for broken, message in (
            ({}, "has no list of images"),
            ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, "is not the id of an image"),
            ([], "not a COCO file"),
        ):
            path.write_text(json.dumps(broken))
            with pytest.raises(DataError, match=message):
                captions.read_coco(path)

    def test_ones_own_is_split_and_its_images_are_found(self, tmp_path):
        (tmp_path / "images").mkdir()
        rows = ["image,caption"]
        for k in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{k}.png")
            rows.append(f"{k}.png,Number {k}")
        (tmp_path / "c.csv").write_text("\n".join(rows))
        found = dataset.load("captions", tmp_path, str(tmp_path / "c.csv"), 0.2)
        assert {split: len(items) for split, items in found.splits.items()} == {"train": 8, "val": 2, "test": 0}
        (tmp_path / "images" / "3.png").unlink()
        with pytest.raises(DataError, match=r"'3\.png' is not beside it"):
            dataset.load("captions", tmp_path, str(tmp_path / "c.csv"), 0.2)
        with pytest.raises(ConfigError, match="path is missing"):
            dataset.load("captions", tmp_path)

    def test_flickr8k(self, tmp_path):
        folder = tmp_path / "flickr8k"
        (folder / "Images").mkdir(parents=True)
        (folder / "captions.txt").write_text("image,caption\na.jpg,One .\na.jpg,Two .\nb.jpg,Three .\n")
        for split, name in (("train", "a.webp"), ("dev", "b.jpg"), ("test", "a.webp")):
            (folder / f"Flickr_8k.{split}Images.txt").write_text(f"{name}\n")
        found = dataset.load("flickr8k", tmp_path)
        assert found.splits["train"][0].captions == ("One .", "Two .")
        assert found.splits["train"][0].path == folder / "Images" / "a.webp"
        (folder / "Flickr_8k.devImages.txt").write_text("c.jpg\n")
        with pytest.raises(DataError, match=r"no caption of c\.jpg"):
            dataset.load("flickr8k", tmp_path)
        with pytest.raises(DataError, match="flickr8k is not in"):
            dataset.load("flickr8k", tmp_path / "none")


class TestScenes:
    def test_the_left_or_the_upper_thing_comes_first(self):
        def thing(shape, color, x, y):
            return generator.SceneObject(shape, color, (x - 10.0, y - 10.0, x + 10.0, y + 10.0), (0.0, 0.0), 1.0, 0.0)

        def said(*things):
            return scene_captions.describe(generator.Scene(torch.zeros(1), things))

        star, ring = thing("star", "red", 150, 100), thing("ring", "blue", 60, 110)
        assert said(star) == "a red star"
        assert said(star, ring) == said(ring, star) == "a blue ring left of a red star"
        assert said(star, thing("ring", "blue", 140, 20)) == "a blue ring above a red star"
        assert said(star, thing("ring", "blue", 60, 20)) is None
        assert said() is None

    def test_parts(self):
        found = scene_captions.parse_caption("a blue ring left of a red star")
        assert found == {"colours": ("blue", "red"), "shapes": ("ring", "star"), "relations": ("left of",)}
        assert scene_captions.parse_caption("a red star")["relations"] == ()

    def test_the_set(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scene_captions, "COUNTS", COUNTS)
        found = dataset.load("scene_captions", tmp_path)
        assert {split: len(items) for split, items in found.splits.items()} == COUNTS
        item = found.splits["val"][0]
        assert photos.load(item.path).size == (224, 224)
        words = item.captions[0].split()
        assert words[0] == "a"
        assert len(words) in (3, 7, 8)
        pictures = {item.path.read_bytes() for items in found.splits.values() for item in items}
        assert len(pictures) == sum(COUNTS.values())
