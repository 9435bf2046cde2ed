"""Readers of caption files."""

import json

import pytest

from cvlab.data import captions
from cvlab.errors import DataError


def test_csv_with_commas_and_quotes(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('image,caption\na.jpg,"A dog, ""big"" ."\nb.jpg,Two\n\na.jpg,Again\n')
    assert captions.read_csv(path) == {"a.jpg": ['A dog, "big" .', "Again"], "b.jpg": ["Two"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,text\na,b\n", r"c\.csv:1: not a table"),
        ("image,caption\na.jpg\n", r"c\.csv:2: needs"),
        ("image,caption\na.jpg,x\nb.jpg, \n", r"c\.csv:3: needs"),
        ("image,caption\n", "no caption in it"),
    ],
)
def test_errors_of_a_csv_name_the_line(tmp_path, text, message):
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        captions.read_csv(path)


def test_coco(tmp_path):
    path = tmp_path / "c.json"
    content = {
        "images": [{"id": 7, "file_name": "x.jpg"}],
        "annotations": [{"image_id": 7, "caption": " A cat. "}, {"image_id": 7, "caption": "One cat"}],
    }
    path.write_text(json.dumps(content))
    assert captions.read_coco(path) == {"x.jpg": ["A cat.", "One cat"]}
    for broken, message in (
        ({}, "has no list of images"),
        ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, "is not the id of an image"),
        ([], "not a COCO file"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=message):
            captions.read_coco(path)
