"""Published data sets in COCO's layout, used for detection: read, checked and installed."""

import dataclasses
import hashlib
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
from cvlab.storage import download
from tests.coco_files import CATEGORIES, set_counts, write_coco_set
from tests.conftest import REAL_DATA
from tests.fake_cifar import send, server

COUNTS = {"train": 4, "val": 2, "test": 3}


def boxes_by_photo(document):
    """Return the boxes of each photo as (class, x1, y1, x2, y2), without using cvlab's readers."""
    names = {record["id"]: record["name"] for record in document["categories"]}
    rows = {record["file_name"]: [] for record in document["images"]}
    files = {record["id"]: record["file_name"] for record in document["images"]}
    for record in document["annotations"]:
        x, y, width, height = record["bbox"]
        rows[files[record["image_id"]]].append((names[record["category_id"]], x, y, x + width, y + height))
    return rows


def assert_same_boxes(loaded, split, document):
    expected = boxes_by_photo(document)
    assert [sample.path.name for sample in loaded.splits[split]] == list(expected)
    for sample in loaded.splits[split]:
        names = [loaded.classes[label] for label in sample.labels.tolist()]
        photo_rows = expected[sample.path.name]
        assert names == [row[0] for row in photo_rows]
        for box, row in zip(sample.boxes_xyxy.tolist(), photo_rows, strict=True):
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
        assert catalog.fetch("coco_people", origin)["detail"].startswith("9 photos")
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


SHORT = ("size=64", "batch_size=2", "duration={steps: 2}", "expect=[]", "threads=1")


def test_yolo_coco_is_planned_and_trains_on_a_tiny_coco(cvlab, tmp_path, monkeypatch):
    write_coco_set(tmp_path / "data", coco_sets.COCO, {"train": 5, "val": 2})
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
    code, _, err = cvlab("train", "yolo_coco", "data.num_train=9", "--dry-run")
    assert code == 2
    assert "coco has 5 photos in 'train'; name another split, or lower num_train" in err
    code, out, err = cvlab("train", "yolo_coco", "data.num_train=4", "--dry-run", "--json")
    assert code == 0, err
    assert (json.loads(out)["data"], json.loads(out)["data_ready"]) == ("coco", True)
    code, out, err = cvlab("train", "yolo_coco", "data.num_train=4", *SHORT, "--json")
    assert code == 0, err
    assert {"map50", "map50_95", "ap50/car"} <= json.loads(out)["metrics"].keys()


def test_the_fallback_of_yolo_coco_may_have_fewer_photos_than_num_train(cvlab):
    code, out, err = cvlab("train", "yolo_coco", "data.num_train=16000", *SHORT, "expect_fallback=[]", "--json")
    assert code == 0, err
    assert "coco is not on the disk (offline); falling back to scenes" in err
    assert json.loads(out)["data"] == "scenes (fallback for coco)"


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


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Return the archives of a tiny COCO 2017, by their path on the server, and the documents in them."""
    counts = {"train": 4, "val": 2}
    written = write_coco_set(tmp_path / "made", coco_sets.COCO, counts)
    set_counts(monkeypatch, coco_sets.COCO, counts)
    contents, archives = {}, []
    for archive in coco_sets.ARCHIVES:
        path = shutil.make_archive(
            str(tmp_path / "zips" / archive.folder), "zip", tmp_path / "made/coco", archive.folder
        )
        raw = Path(path).read_bytes()
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        contents[f"/{archive.path}"] = raw
        archives.append(dataclasses.replace(archive, size=len(raw), checksum=f"md5:{md5}", unpacked_bytes=100_000))
    monkeypatch.setattr(coco_sets, "ARCHIVES", tuple(archives))
    monkeypatch.setattr(coco_sets, "URL", "")
    monkeypatch.setattr(download, "ANSWER_SECONDS", 1.0)
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("CVLAB_OFFLINE", "0")
    return contents, written


def test_coco_is_downloaded_and_an_interrupted_fetch_is_continued(tmp_path, monkeypatch, published):
    contents, written = published
    train = coco_sets.ARCHIVES[2]

    def cut_off(handler):
        raw = contents[handler.path]
        send(handler, raw, cut=len(raw) // 2 if handler.path.endswith(train.name) else None)

    with server(cut_off) as (url, _):
        monkeypatch.setattr(coco_sets, "URL", url)
        with pytest.raises(DataError, match="cut off after"):
            catalog.fetch("coco", None)
    assert sorted(os.listdir(tmp_path / "root/coco")) == ["annotations", "val2017"]
    assert not datasets.get("coco").ready(tmp_path / "root")
    with server(lambda handler: send(handler, contents[handler.path])) as (url, requests):
        monkeypatch.setattr(coco_sets, "URL", url)
        summary = catalog.fetch("coco", None)["detail"]
        assert requests == [(f"/{train.path}", f"bytes={train.size // 2}-")], "existing files are not downloaded again"
        assert catalog.fetch("coco", None)["detail"] == summary
        assert len(requests) == 1
    assert summary.startswith("6 photos, ")
    assert summary.endswith("6 photos, 30 captions")
    assert os.listdir(tmp_path / "root/downloads/coco") == []
    loaded = dataset.load("coco", tmp_path / "root")
    assert {split: len(samples) for split, samples in loaded.splits.items()} == {"train": 4, "val": 2, "test": 0}
    for split in ("train", "val"):
        assert_same_boxes(loaded, split, written["instances", split])


def test_coco_from_archives(tmp_path, monkeypatch, published):
    contents, _ = published
    for archive in coco_sets.ARCHIVES:
        (tmp_path / "archives" / archive.name).parent.mkdir(exist_ok=True)
        (tmp_path / "archives" / archive.name).write_bytes(contents[f"/{archive.path}"])
    assert catalog.fetch("coco", tmp_path / "archives")["detail"].startswith("6 photos, ")
    val = tmp_path / "archives/val2017.zip"
    coco_sets.fetch_coco(tmp_path / "single", val, True)
    assert os.listdir(tmp_path / "single/coco") == ["val2017"]
    with pytest.raises(DataError, match=r"no archive of COCO; name a folder with annotations_trainval2017\.zip"):
        coco_sets.fetch_coco(tmp_path / "other", tmp_path / "made", True)
    val.write_bytes(val.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"differs from the published file \(md5\)"):
        coco_sets.fetch_coco(tmp_path / "other", val, True)
    set_counts(monkeypatch, coco_sets.COCO, {"train": 5})
    with pytest.raises(DataError, match="4 photos, not 5"):
        coco_sets.fetch_coco(tmp_path / "other", tmp_path / "archives/train2017.zip", True)
    assert not (tmp_path / "other/coco").exists()


def test_coco_checks_the_free_space_before_the_download(tmp_path, monkeypatch, published):
    contents, _ = published
    needed = sum(archive.unpacked_bytes for archive in coco_sets.ARCHIVES) + coco_sets.ARCHIVES[2].size
    usage = shutil.disk_usage(tmp_path)
    with server(lambda handler: send(handler, contents[handler.path])) as (url, requests):
        monkeypatch.setattr(coco_sets, "URL", url)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(DataError, match=r"coco needs .* are free; free space, or choose another folder"):
            catalog.fetch("coco", None)
        assert requests == []
        assert not (tmp_path / "root").exists()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        catalog.fetch("coco", None)


def test_sources_of_coco_equal_the_official_ones():
    assert [f"{coco_sets.URL}/{archive.path}" for archive in coco_sets.ARCHIVES] == [
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "http://images.cocodataset.org/zips/val2017.zip",
        "http://images.cocodataset.org/zips/train2017.zip",
    ]
    assert all(archive.unpacked_bytes > archive.size for archive in coco_sets.ARCHIVES)
