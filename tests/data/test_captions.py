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
    for document, message in (
        ({}, "has no list of images"),
        ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, "is not the id of an image"),
        ([], "not a COCO file"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(DataError, match=message):
            captions.read_coco(path)


CSV_CAPTIONS = {  # text after the first comma -> the caption
    "A dog, running": "A dog, running",
    "A dog, a cat, and , commas": "A dog, a cat, and , commas",
    '"Stop" is written': '"Stop" is written',
    '"Stop" is written, says "he"': '"Stop" is written, says "he"',
    'a sign "Stop"': 'a sign "Stop"',
    'a 12" pipe': 'a 12" pipe',
    '"A dog, running"': "A dog, running",
    '"A ""big"" dog"': 'A "big" dog',
    ' "A dog" ': "A dog",
    '"A dog\nruns"': "A dog runs",
    "\u201eQuoted\u201c, he says": "\u201eQuoted\u201c, he says",
    "A\u2028dog": "A dog",
    "=1+1": "=1+1",
    "A dog,": "A dog,",
}


@pytest.mark.parametrize("text", CSV_CAPTIONS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_captions_with_commas_quotes_and_line_breaks_are_complete(tmp_path, text, end, start):
    path = tmp_path / "c.csv"
    raw = f"{start}image,caption\na.jpg,{text}\nb.jpg,Next\n".replace("\n", end)
    path.write_bytes(raw.encode())
    assert captions.read(path) == {"a.jpg": [CSV_CAPTIONS[text]], "b.jpg": ["Next"]}


def test_captions_with_unquoted_commas_are_counted_in_a_warning(tmp_path, capsys):
    path = tmp_path / "c.csv"
    path.write_text("image,caption\n" + "".join(f"{k}.jpg,a dog, running\n" for k in range(5)) + '5.jpg,"a, b"\n')
    captions.read_csv(path)
    shown = ", ".join(f"{path}:{k}" for k in (2, 3, 4))
    assert f"captions with commas but without quotes read whole: 5 ({shown}, ...)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a.jpg,"A dog\nb.jpg,A cat\nc.jpg,"Three"\n', r"c\.csv:2: a quote is not closed"),
        ('a.jpg,"A dog\nb.jpg,A cat\nc.jpg,Three"\n', r"c\.csv:2: a quote is not closed"),
        ('a,"A dog\nb,A cat\nc,Three"\n', r"c\.csv:2: a quote is not closed"),
        ('a.jpg,A dog\nb.jpg,"A cat\n', r"c\.csv:3: a quote is not closed"),
        ('a.jpg,"A ""big"" dog" runs\n', r"c\.csv:2: text after the closing quote"),
        ("a.jpg,\n", r"c\.csv:2: needs an image and a caption"),
        ('a.jpg,""\n', r"c\.csv:2: needs an image and a caption"),
        (",A dog\n", r"c\.csv:2: needs an image and a caption"),
    ],
)
def test_a_malformed_row_is_rejected_with_its_line_number(tmp_path, text, message):
    path = tmp_path / "c.csv"
    path.write_text(f"image,caption\n{text}")
    with pytest.raises(DataError, match=message):
        captions.read_csv(path)


def test_additional_columns(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('image,caption,source\na.jpg,"A dog, running",x\nb.jpg,A cat,\n')
    assert captions.read_csv(path) == {"a.jpg": ["A dog, running"], "b.jpg": ["A cat"]}
    path.write_text("image,caption,source\na.jpg,A dog, running,x\n")
    with pytest.raises(DataError, match=r"c\.csv:2: 4 columns where the first line has 3"):
        captions.read_csv(path)
    path.write_text("image,caption,source\na.jpg,A dog\n")
    with pytest.raises(DataError, match=r"c\.csv:2: 2 columns where the first line has 3"):
        captions.read_csv(path)


def coco_captions(caption="A cat."):
    content = {"images": [{"id": 7, "file_name": "x.jpg"}], "annotations": [{"image_id": 7, "caption": caption}]}
    return json.dumps(content)


@pytest.mark.parametrize("name", ["c.json", "c.JSON", "C.Json", "captions.txt", "captions"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_is_recognized_by_its_content(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_text(coco_captions(), encoding=encoding)
    assert captions.read(path) == {"x.jpg": ["A cat."]}


@pytest.mark.parametrize("caption", [None, [], ["A cat."], "", "  ", 7, {}, True])
def test_a_caption_that_is_not_text_is_rejected(tmp_path, caption):
    path = tmp_path / "c.json"
    path.write_text(coco_captions(caption))
    with pytest.raises(DataError, match=r"c\.json: annotations\[0\]: has no caption"):
        captions.read(path)


@pytest.mark.parametrize("image_id", [[7], {"id": 7}, None, 8, True, "x", 7.5, 10**400])
def test_an_unknown_image_is_rejected(tmp_path, image_id):
    path = tmp_path / "c.json"
    content = json.loads(coco_captions())
    content["annotations"][0]["image_id"] = image_id
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotations\[0\]: image_id is not the id of an image"):
        captions.read(path)
