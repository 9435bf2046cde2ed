"""Captioned data sets: your own, Flickr8k, and the built-in scenes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cvlab.data import coco_sets, photos
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.captioning import dataset, scene_captions
from cvlab.experiments.captioning.config import CaptionDataConfig
from tests.coco_files import write_coco_set
from tests.conftest import REAL_DATA

COUNTS = {"train": 6, "val": 2, "test": 2}


def test_custom_captions_are_split_and_their_images_are_found(tmp_path):
    (tmp_path / "images").mkdir()
    rows = ["image,caption"]
    for k in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{k}.png")
        rows.append(f"{k}.png,Number {k}")
    (tmp_path / "c.csv").write_text("\n".join(rows))
    loaded = dataset.load("captions", tmp_path, str(tmp_path / "c.csv"), 0.2)
    assert {split: len(samples) for split, samples in loaded.splits.items()} == {"train": 8, "val": 2, "test": 0}
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(DataError, match=r"'3\.png' is not beside it"):
        dataset.load("captions", tmp_path, str(tmp_path / "c.csv"), 0.2)


def test_a_path_is_only_for_custom_captions(tmp_path):
    with pytest.raises(ConfigError, match="path is missing"):
        dataset.load("captions", tmp_path)
    with pytest.raises(ConfigError, match="path requires name: captions"):
        dataset.load("flickr8k", tmp_path, str(tmp_path / "c.csv"))


def test_flickr8k(tmp_path):
    folder = tmp_path / "flickr8k"
    (folder / "Images").mkdir(parents=True)
    (folder / "captions.txt").write_text("image,caption\na.jpg,One .\na.jpg,Two .\nb.jpg,Three .\n")
    for split, name in (("train", "a.webp"), ("dev", "b.jpg"), ("test", "a.webp")):
        (folder / f"Flickr_8k.{split}Images.txt").write_text(f"{name}\n")
    loaded = dataset.load("flickr8k", tmp_path)
    assert loaded.splits["train"][0].captions == ("One .", "Two .")
    assert loaded.splits["train"][0].path == folder / "Images" / "a.webp"
    (folder / "Flickr_8k.devImages.txt").write_text("c.jpg\n")
    with pytest.raises(DataError, match=r"no caption of c\.jpg"):
        dataset.load("flickr8k", tmp_path)
    with pytest.raises(DataError, match="flickr8k is not in"):
        dataset.load("flickr8k", tmp_path / "none")


def test_scene_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_captions, "COUNTS", COUNTS)
    loaded = dataset.load("scene_captions", tmp_path)
    assert {split: len(samples) for split, samples in loaded.splits.items()} == COUNTS
    sample = loaded.splits["val"][0]
    assert photos.load(sample.path).size == (224, 224)
    tokens = sample.captions[0].split()
    assert tokens[0] == "a"
    assert len(tokens) in (3, 7, 8)
    images = {sample.path.read_bytes() for samples in loaded.splits.values() for sample in samples}
    assert len(images) == sum(COUNTS.values())


def captions_by_file(document):
    """Return the captions of each photo, without using cvlab's readers."""
    files = {record["id"]: record["file_name"] for record in document["images"]}
    captions = {}
    for record in document["annotations"]:
        captions.setdefault(files[record["image_id"]], []).append(record["caption"].strip())
    return captions


def test_coco_people_has_the_captions_of_its_files(tmp_path):
    with pytest.raises(DataError, match="coco_people is not in"):
        dataset.load("coco_people", tmp_path)
    counts = {"train": 4, "val": 2, "test": 3}
    written = write_coco_set(tmp_path, coco_sets.COCO_PEOPLE, counts)
    loaded = dataset.load("coco_people", tmp_path)
    for split in counts:
        assert {sample.path.name: list(sample.captions) for sample in loaded.splits[split]} == captions_by_file(
            written["captions", split]
        )
        assert all(sample.path.is_file() for sample in loaded.splits[split])
    with pytest.raises(DataError, match="4 photos of train, not 2000"):
        dataset.COCO_PEOPLE.check(tmp_path)


@pytest.mark.realdata
def test_the_real_coco_people():
    root = Path(REAL_DATA or "none")
    if not dataset.COCO_PEOPLE.ready(root):
        pytest.skip("CVLAB_DATA has no coco_people")
    assert dataset.COCO_PEOPLE.check(root) == "2500 photos, 12506 captions"
    loaded = dataset.load("coco_people", root)
    assert {split: len(samples) for split, samples in loaded.splits.items()} == coco_sets.PEOPLE_SPLITS
    document = json.loads((root / "coco_people/annotations/captions_test.json").read_text())
    assert {sample.path.name: list(sample.captions) for sample in loaded.splits["test"]} == captions_by_file(document)


def test_extra_data_sets_add_training_photos(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_captions, "COUNTS", COUNTS)
    write_coco_set(tmp_path, coco_sets.COCO_PEOPLE, {"train": 4, "val": 2, "test": 3})
    config = CaptionDataConfig(name="coco_people", extra=("scene_captions",))
    combined = dataset.load_configured(config, tmp_path)
    people, scenes = dataset.load("coco_people", tmp_path), dataset.load("scene_captions", tmp_path)
    assert combined.name == "coco_people + scene_captions"
    assert combined.splits["train"] == people.splits["train"] + scenes.splits["train"]
    assert (combined.splits["val"], combined.splits["test"]) == (people.splits["val"], people.splits["test"])
    assert combined.extra == (scenes,)
    assert combined.digest() != people.digest()
    assert dataset.load_configured(CaptionDataConfig(name="coco_people"), tmp_path) == people


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"extra": ("flickr",)}, "unknown data set 'flickr'"),
        ({"extra": ("voc07",)}, "has photos with boxes, captioned photos are needed"),
        ({"extra": ("flickr8k",)}, "names each data set once"),
        ({"extra": ("captions",)}, "and not captions, which is"),
        ({"extra": ("coco_people",), "num_train": 3}, "num_train and extra exclude each other"),
    ],
)
def test_invalid_extra_data_sets_are_rejected(keys, message):
    with pytest.raises(ValueError, match=message):
        CaptionDataConfig(name="flickr8k", **keys)
