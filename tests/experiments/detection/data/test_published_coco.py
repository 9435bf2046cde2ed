"""Published data sets in COCO's layout as detection sets: read, checked and installed."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from cvlab.api import catalog
from cvlab.data import coco_sets, datasets
from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset
from tests.coco_files import CATEGORIES, set_counts, write_coco_set
from tests.conftest import REAL_DATA

COUNTS = {"train": 4, "val": 2, "test": 3}


def rows_of(document):
    """Return the boxes of each photo as (class, x1, y1, x2, y2), without cvlab's readers."""
    names = {record["id"]: record["name"] for record in document["categories"]}
    rows = {record["file_name"]: [] for record in document["images"]}
    files = {record["id"]: record["file_name"] for record in document["images"]}
    for record in document["annotations"]:
        x, y, width, height = record["bbox"]
        rows[files[record["image_id"]]].append((names[record["category_id"]], x, y, x + width, y + height))
    return rows


def assert_same_boxes(loaded, split, document):
    expected = rows_of(document)
    assert [sample.path.name for sample in loaded.splits[split]] == list(expected)
    for sample in loaded.splits[split]:
        names = [loaded.classes[label] for label in sample.labels.tolist()]
        of_photo = expected[sample.path.name]
        assert names == [row[0] for row in of_photo]
        for box, row in zip(sample.boxes_xyxy.tolist(), of_photo, strict=True):
            assert box == pytest.approx(row[1:], abs=0.2), "boxes are rounded to a tenth, and clipped"


def test_coco_people_has_the_boxes_of_its_files(tmp_path, monkeypatch):
    written = write_coco_set(tmp_path, coco_sets.COCO_PEOPLE, COUNTS, ".webp")
    loaded = dataset.load("coco_people", tmp_path)
    assert loaded.classes == tuple(CATEGORIES.values())
    for split, count in COUNTS.items():
        assert len(loaded.splits[split]) == count
        assert_same_boxes(loaded, split, written["instances", split])
    set_counts(monkeypatch, coco_sets.COCO_PEOPLE, COUNTS)
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path))
    num_boxes = sum(len(written["instances", split]["annotations"]) for split in COUNTS)
    boxes, captions = catalog.check("coco_people")["coco_people"].split("; ")
    assert boxes == f"9 photos, {num_boxes} boxes, 3 classes, every annotation can be read"
    assert captions == "9 photos, 45 captions"


def test_missing_files_of_coco_people(tmp_path):
    with pytest.raises(DataError, match=r"coco_people is not in .*`cvlab data fetch coco_people` gets it, or says how"):
        dataset.load("coco_people", tmp_path)
    write_coco_set(tmp_path, coco_sets.COCO_PEOPLE, COUNTS)
    assert datasets.get("coco_people").ready(tmp_path)
    with pytest.raises(DataError, match="4 photos of train, not 2000"):
        datasets.get("coco_people").check(tmp_path)
    (tmp_path / "coco_people/annotations/instances_val.json").unlink()
    assert not datasets.get("coco_people").ready(tmp_path)
    with pytest.raises(DataError, match=r"instances_val\.json: no such file"):
        dataset.load("coco_people", tmp_path)


def test_coco_people_is_copied_from_a_folder_or_a_zip_file(tmp_path, monkeypatch):
    write_coco_set(tmp_path / "source", coco_sets.COCO_PEOPLE, COUNTS)
    set_counts(monkeypatch, coco_sets.COCO_PEOPLE, COUNTS)
    source = tmp_path / "source/coco_people"
    shutil.make_archive(str(tmp_path / "people"), "zip", tmp_path / "source")
    for number, origin in enumerate((source, tmp_path / "source", tmp_path / "people.zip")):
        monkeypatch.setenv("CVLAB_DATA", str(tmp_path / f"root{number}"))
        assert catalog.fetch("coco_people", origin)["found"].startswith("9 photos")
        assert os.listdir(tmp_path / f"root{number}") == ["coco_people"]
    for origin in (tmp_path / "source/coco_people/images", tmp_path / "none"):
        with pytest.raises(DataError, match="not coco_people; name a folder coco_people"):
            datasets.get("coco_people").fetch(tmp_path / "other", origin, True)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("../out", "x")
    with pytest.raises(DataError, match="would be written outside"):
        datasets.get("coco_people").fetch(tmp_path / "other", tmp_path / "bad.zip", True)
    with pytest.raises(DataError, match=r"published nowhere as it is; `cvlab data fetch coco_people --from"):
        datasets.get("coco_people").fetch(tmp_path / "other", None, True)
    assert not os.listdir(tmp_path / "other")


@pytest.mark.realdata
def test_the_real_coco_people(capsys):
    root = Path(REAL_DATA or "none")
    if not datasets.get("coco_people").ready(root):
        pytest.skip("CVLAB_DATA has no coco_people")
    loaded = dataset.load("coco_people", root)
    assert {split: len(samples) for split, samples in loaded.splits.items()} == coco_sets.PEOPLE_SPLITS
    counts = [sum(len(sample.labels) for sample in samples) for samples in loaded.splits.values()]
    assert counts == [18_742, 1_827, 2_852]
    assert len(loaded.classes) == 80
    for split in loaded.splits:
        document = json.loads((root / f"coco_people/annotations/instances_{split}.json").read_text())
        assert loaded.classes == tuple(record["name"] for record in document["categories"])
        assert_same_boxes(loaded, split, document)
    assert capsys.readouterr().err == ""
