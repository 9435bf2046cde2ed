"""VOC's format: written annotations are read back, and invalid ones are rejected with file and line."""

import shutil
import time

import pytest
import torch

from cvlab.errors import DataError
from cvlab.experiments.detection.data import voc
from tests.experiments.detection.data.box_files import BOXES, SIZE, find_sample, load, voc_set, write


def test_round_trip(tmp_path):
    loaded = load(voc_set(tmp_path))
    assert loaded.classes == ("cat", "dog")
    assert loaded.name == "boxes"
    item = find_sample(loaded, "c")
    assert torch.equal(item.boxes_xyxy, BOXES)
    assert item.boxes_xyxy.dtype == torch.float32
    assert item.labels.tolist() == [0, 1, 0]
    assert item.labels.dtype == torch.int64
    assert item.difficult.tolist() == [False, True, False]
    assert item.difficult.dtype == torch.bool
    assert loaded.load(item).size == SIZE
    assert {split: len(items) for split, items in loaded.splits.items()} == {"train": 1, "val": 1, "test": 1}


def test_coordinates_are_one_based_and_inclusive(tmp_path):
    voc_set(tmp_path, lists=False)
    edges = "<xmin>1</xmin><ymin>3</ymin><xmax>2</xmax><ymax>40</ymax>"
    write(
        tmp_path / "Annotations/a.xml",
        f"<annotation><object><name>cat</name><bndbox>{edges}</bndbox></object></annotation>",
    )
    assert find_sample(load(tmp_path), "a").boxes_xyxy.tolist() == [[0, 2, 2, 40]]


def test_layouts(tmp_path):
    beside = tmp_path / "beside"
    for split in ("train", "valid", "test"):
        voc_set(tmp_path / "source" / split, lists=False)
        (beside / split).mkdir(parents=True)
        for path in (tmp_path / "source" / split).glob("*/*"):
            shutil.copy(path, beside / split)
    voc_set(tmp_path / "flat", lists=False, ending=".PNG")
    assert [len(items) for items in load(beside).splits.values()] == [3, 3, 3]
    assert [len(items) for items in load(tmp_path / "flat").splits.values()] == [2, 1, 0]
    assert [len(items) for items in load(tmp_path / "flat", val_fraction=0.0).splits.values()] == [3, 0, 0]


BROKEN_XML = [
    ("<annotation>\n<object>\n</annotation>", r"a.xml:3: not valid XML: mismatched tag"),
    ("", r"a.xml:1: not valid XML: no element found"),
    ("\n\n<other/>", r"a.xml:3: <other> where <annotation> is expected"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>\n<annotation/>', r"a.xml:1: a document type is not allowed"),
    ("<annotation>&lol;</annotation>", r"a.xml:1: not valid XML: undefined entity"),
    ('<?xml version="1.0" encoding="no-such"?><annotation/>', r"a.xml:1: not valid XML"),
    ("<a>" * 30 + "</a>" * 30, r"a.xml:1: nested deeper"),
    ("<annotation>" + " " * 5_000_000 + "</annotation>", r"a.xml: larger than 5 MB"),
    ("<annotation>" + "<a/>" * 200_000 + "</annotation>", r"a.xml:1: more than 100000 elements"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN_XML)
def test_invalid_xml_is_rejected_with_file_and_line(tmp_path, text, message):
    write(voc_set(tmp_path) / "Annotations/a.xml", text)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_text_of_many_pieces_takes_linear_time(tmp_path):
    text = "<annotation><object><name>" + "&#10;x" * 700_000 + "</name></object></annotation>"
    start_time = time.process_time()
    assert len(voc.parse_xml(write(tmp_path / "a.xml", text)).children[0].text_of("name")) == 1_399_999
    assert time.process_time() - start_time < 5, "about 0.5 s on an idle machine"


def test_missing_files(tmp_path):
    folder = voc_set(tmp_path)
    write(folder / "JPEGImages/a.jpg", "no photo")
    (folder / "JPEGImages/b.jpg").unlink()
    with pytest.raises(DataError, match=r"no photos to train on; .*a.jpg: not a photo that can be read"):
        load(tmp_path)
    (folder / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match=r"train.txt: no such file"):
        load(tmp_path)
