"""COCO's format: written annotations are read back, and invalid ones are rejected with their position."""

import json
import shutil

import pytest
import torch

from cvlab.errors import DataError
from cvlab.experiments.detection import evaluation
from tests.experiments.detection.data.box_files import BOXES, coco_set, find_sample, load, write


def test_round_trip(tmp_path):
    loaded = load(coco_set(tmp_path))
    assert loaded.classes == ("dog", "cat")
    assert torch.equal(find_sample(loaded, "a").boxes_xyxy, BOXES)
    assert find_sample(loaded, "a").labels.tolist() == [1, 0, 1]
    assert len(find_sample(loaded, "b").labels) == 0


def test_coco_json_can_be_read_by_an_independent_reader(tmp_path, capfd):
    coco = pytest.importorskip("faster_coco_eval").COCO(
        str(coco_set(tmp_path) / "annotations/instances_train2017.json")
    )
    assert [coco.cats[k]["name"] for k in coco.getCatIds()] == ["dog", "cat"]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
    assert torch.equal(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), BOXES)
    assert [annotation["category_id"] for annotation in annotations] == [2, 1, 2]
    assert coco.getAnnIds(imgIds=[2]) == []


def test_layouts(tmp_path):
    coco_set(tmp_path / "beside", "all.json", "")
    coco_set(tmp_path / "images", "all.json", "images")
    for split in ("train", "valid", "test"):
        coco_set(tmp_path / "splits" / split, "_annotations.coco.json", "")
    for year in ("train2017", "val2017"):
        coco_set(tmp_path / "official", f"annotations/instances_{year}.json", year)
        write(tmp_path / "official" / f"annotations/captions_{year}.json", "{}")
    for name, sizes in {"beside": [1, 1, 0], "images": [1, 1, 0], "splits": [2, 2, 2], "official": [2, 2, 0]}.items():
        loaded = load(tmp_path / name)
        assert [len(items) for items in loaded.splits.values()] == sizes, name
        assert torch.equal(find_sample(loaded, "a").boxes_xyxy, BOXES), name
    assert len(load(tmp_path / "beside/all.json").splits["train"]) == 1
    shutil.copy(tmp_path / "beside/all.json", tmp_path / "beside/some.json")
    with pytest.raises(DataError, match=r"all.json: no split .* in its name; name one JSON file"):
        load(tmp_path / "beside")


def test_a_crowd_is_difficult(tmp_path):
    path = coco_set(tmp_path) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    sample = find_sample(load(tmp_path), "a")
    assert sample.difficult.tolist() == sample.crowd.tolist() == [False, True, False]
    assert evaluation.ground_truths([sample])[0].is_crowd.tolist() == [False, True, False]
    assert find_sample(load(tmp_path), "b").crowd is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=9), r"annotations\[0\]: category_id 9 is in no category"),
        (
            lambda c: c["annotations"][0].update(category_id=[1]),
            r"annotations\[0\]: category_id \[1\] is in no category",
        ),
        (lambda c: c["images"][1].update(id=[1]), r"images\[1\]: id is not a unique integer"),
        (lambda c: c["categories"][1].update(id={"a": 1}), r"categories\[1\]: id is not a unique integer"),
        (lambda c: c["images"][1].update(id=None), r"images\[1\]: id is not a unique integer"),
        (lambda c: [i.update(file_name="z.jpg") for i in c["images"]], r"no photos to train on; .*image 1: 'z.jpg'"),
        (lambda c: [a.update(bbox=[1]) for a in c["annotations"]], r"no object in any photo; .*annotations\[0\]"),
        (lambda c: c["images"][1].update(id=1), r"images\[1\]: id is not a unique integer"),
        (lambda c: c["images"][1].pop("file_name"), r"image 2 has no file_name"),
        (lambda c: c.pop("categories"), r"has no list of categories"),
    ],
)
def test_invalid_records_are_rejected(tmp_path, change, message):
    path = coco_set(tmp_path) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"images": [,]}', r"t.json:2: not valid JSON"),
        ("[]", "its top level is not an object"),
        ("[" * 99999, "not valid JSON"),
        ('{"images": [NaN]}', "NaN is not a number"),
    ],
)
def test_invalid_json_is_rejected(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "t.json", text))
