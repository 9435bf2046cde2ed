"""Photos with boxes: three layouts read right, what is odd counted or refused, and written back the same."""

import dataclasses
import hashlib
import json
import shutil
import tarfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from cvlab import console
from cvlab.api import catalog
from cvlab.data import datasets, photos
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.classification.data.images import ImageDatasetSource
from cvlab.experiments.detection.data import annotations, dataset, downloads, writers
from cvlab.storage import download, zipfiles
from tests.conftest import REAL_DATA

SIZE = (60, 40)
BOXES = torch.tensor([[4.0, 5.0, 20.0, 30.0], [0.0, 0.0, 60.0, 40.0], [31.25, 7.5, 47.75, 12.0]])


def photo(path, size=SIZE, orientation=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[Base.Orientation] = orientation
    Image.new(mode, size).save(path, **({"exif": exif} if orientation is not None else {}))
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def voc_set(folder, names=("a", "b", "c"), lists=True, ending=".jpg"):
    """A set in VOC's layout, every photo with BOXES; the last one is the test list."""
    for name in names:
        photo(folder / "JPEGImages" / f"{name}{ending}")
        xml = writers.write_voc_xml(BOXES, ["cat", "dog", "cat"], SIZE, f"{name}{ending}", [False, True, False])
        write(folder / "Annotations" / f"{name}.xml", xml)
    if lists:
        write(folder / "ImageSets/Main/train.txt", "".join(f"{name}\n" for name in names[:-1]))
        write(folder / "ImageSets/Main/test.txt", f"{names[-1]}\n")
    return folder


def coco_set(folder, file="annotations/instances_train2017.json", images="train2017"):
    for name in ("a.jpg", "b.jpg"):
        photo(folder / images / name)
    boxed = writers.Boxed("a.jpg", SIZE, BOXES, torch.tensor([1, 0, 1]))
    empty = writers.Boxed("b.jpg", SIZE, BOXES[:0], torch.tensor([]))
    write(folder / file, writers.write_coco_json([boxed, empty], ["dog", "cat"]))
    return folder


def yolo_set(folder):
    for split, names in {"train": "ab", "val": "c", "test": "d"}.items():
        for name in names:
            photo(folder / "images" / split / f"{name}.png")
            text = writers.write_yolo_txt(BOXES, torch.tensor([1, 0, 1]), SIZE)
            write(folder / "labels" / split / f"{name}.txt", text)
    (folder / "labels/train/b.txt").unlink()
    write(folder / "data.yaml", "names:\n  0: dog\n  1: cat\n")
    return folder


def load(path, **options):
    return dataset.load("boxes", Path("nowhere"), str(path), **options)


def of(found, stem):
    return next(item for items in found.splits.values() for item in items if item.path.stem == stem)


def test_what_is_written_as_voc_is_read_back(tmp_path):
    found = load(voc_set(tmp_path))
    assert found.classes == ("cat", "dog")
    assert found.name == "boxes"
    item = of(found, "c")
    assert torch.equal(item.boxes_xyxy, BOXES)
    assert item.boxes_xyxy.dtype == torch.float32
    assert item.labels.tolist() == [0, 1, 0]
    assert item.labels.dtype == torch.int64
    assert item.difficult.tolist() == [False, True, False]
    assert item.difficult.dtype == torch.bool
    assert found.load(item).size == SIZE
    assert {split: len(items) for split, items in found.splits.items()} == {"train": 1, "val": 1, "test": 1}


def test_pixels_of_voc_count_from_one_and_the_last_one_is_inside(tmp_path):
    voc_set(tmp_path, lists=False)
    edges = "<xmin>1</xmin><ymin>3</ymin><xmax>2</xmax><ymax>40</ymax>"
    write(
        tmp_path / "Annotations/a.xml",
        f"<annotation><object><name>cat</name><bndbox>{edges}</bndbox></object></annotation>",
    )
    assert of(load(tmp_path), "a").boxes_xyxy.tolist() == [[0, 2, 2, 40]]


def test_what_is_written_as_yolo_is_read_back(tmp_path):
    found = load(yolo_set(tmp_path))
    assert found.classes == ("dog", "cat")
    assert [len(items) for items in found.splits.values()] == [2, 1, 1]
    torch.testing.assert_close(of(found, "d").boxes_xyxy, BOXES, atol=1e-4, rtol=0)
    assert of(found, "d").labels.tolist() == [1, 0, 1]
    without = of(found, "b")
    assert without.boxes_xyxy.shape == (0, 4)
    assert without.labels.shape == without.difficult.shape == (0,)
    assert without.labels.dtype == torch.int64
    assert without.difficult.dtype == torch.bool


def test_other_forms_of_yolo(tmp_path):
    yolo_set(tmp_path / "one")
    for split, called in (("train", "train"), ("val", "valid"), ("test", "test")):
        for kind in ("images", "labels"):
            (tmp_path / "two" / called).mkdir(parents=True, exist_ok=True)
            shutil.copytree(tmp_path / "one" / kind / split, tmp_path / "two" / called / kind)
    write(tmp_path / "two/data.yaml", "nc: 2\nnames: ['dog', 'cat']\n")
    for kind in ("images", "labels"):
        shutil.copytree(tmp_path / "one" / kind / "train", tmp_path / "three" / kind)
    write(tmp_path / "three/labels/classes.txt", "dog\ncat\n")
    scores = torch.tensor([0.5, 0.25, 1.0])
    write(tmp_path / "three/labels/b.txt", writers.write_yolo_txt(BOXES, torch.tensor([1, 0, 1]), SIZE, scores))
    one, two, three = (load(tmp_path / name) for name in ("one", "two", "three"))
    assert one.classes == two.classes == three.classes == ("dog", "cat")
    assert torch.equal(of(one, "c").boxes_xyxy, of(two, "c").boxes_xyxy)
    assert len(two.splits["val"]) == 1
    assert of(three, "b").labels.tolist() == [1, 0, 1]
    assert [len(i) for i in three.splits.values()] == [1, 1, 0]


def test_what_is_written_as_coco_is_read_back(tmp_path):
    found = load(coco_set(tmp_path))
    assert found.classes == ("dog", "cat")
    assert torch.equal(of(found, "a").boxes_xyxy, BOXES)
    assert of(found, "a").labels.tolist() == [1, 0, 1]
    assert len(of(found, "b").labels) == 0


def test_coco_json_is_what_an_independent_reader_takes(tmp_path, capfd):
    coco = pytest.importorskip("faster_coco_eval").COCO(
        str(coco_set(tmp_path) / "annotations/instances_train2017.json")
    )
    assert [coco.cats[k]["name"] for k in coco.getCatIds()] == ["dog", "cat"]
    loaded = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    boxes = torch.tensor([one["bbox"] for one in loaded], dtype=torch.float32)
    assert torch.equal(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), BOXES)
    assert [one["category_id"] for one in loaded] == [2, 1, 2]
    assert coco.getAnnIds(imgIds=[2]) == []


def test_other_forms_of_coco(tmp_path):
    coco_set(tmp_path / "beside", "all.json", "")
    coco_set(tmp_path / "images", "all.json", "images")
    for split in ("train", "valid", "test"):
        coco_set(tmp_path / "splits" / split, "_annotations.coco.json", "")
    for year in ("train2017", "val2017"):
        coco_set(tmp_path / "official", f"annotations/instances_{year}.json", year)
        write(tmp_path / "official" / f"annotations/captions_{year}.json", "{}")
    for name, sizes in {"beside": [1, 1, 0], "images": [1, 1, 0], "splits": [2, 2, 2], "official": [2, 2, 0]}.items():
        found = load(tmp_path / name)
        assert [len(items) for items in found.splits.values()] == sizes, name
        assert torch.equal(of(found, "a").boxes_xyxy, BOXES), name
    assert len(load(tmp_path / "beside/all.json").splits["train"]) == 1
    shutil.copy(tmp_path / "beside/all.json", tmp_path / "beside/some.json")
    with pytest.raises(DataError, match=r"all.json: no split .* in its name; name one JSON file"):
        load(tmp_path / "beside")


def test_a_crowd_is_difficult(tmp_path):
    path = coco_set(tmp_path) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    assert of(load(tmp_path), "a").difficult.tolist() == [False, True, False]


def test_other_forms_of_voc(tmp_path):
    beside = tmp_path / "beside"
    for split in ("train", "valid", "test"):
        voc_set(tmp_path / "made" / split, lists=False)
        (beside / split).mkdir(parents=True)
        for path in (tmp_path / "made" / split).glob("*/*"):
            shutil.copy(path, beside / split)
    voc_set(tmp_path / "flat", lists=False, ending=".PNG")
    assert [len(items) for items in load(beside).splits.values()] == [3, 3, 3]
    assert [len(items) for items in load(tmp_path / "flat").splits.values()] == [2, 1, 0]
    assert [len(items) for items in load(tmp_path / "flat", val_fraction=0.0).splits.values()] == [3, 0, 0]


def test_validation_is_split_off_by_a_fixed_shuffle(tmp_path):
    voc_set(tmp_path, names=[f"n{k:02d}" for k in range(21)])
    found, again = load(tmp_path, val_fraction=0.25), load(tmp_path, val_fraction=0.25)
    names = [item.path.stem for split in ("train", "val") for item in found.splits[split]]
    assert sorted(names) == [f"n{k:02d}" for k in range(20)] != names
    assert len(found.splits["val"]) == 5
    assert [item.path.stem for item in found.splits["test"]] == ["n20"]
    assert names == [item.path.stem for split in ("train", "val") for item in again.splits[split]]
    shorter = load(tmp_path, val_fraction=0.1)
    assert [item.path.stem for item in shorter.splits["val"]] == names[-2:], "the last of the same order"
    write(tmp_path / "ImageSets/Main/val.txt", "n20\n")
    assert [item.path.stem for item in load(tmp_path).splits["train"]] == [f"n{k:02d}" for k in range(20)]


BROKEN_XML = [
    ("<annotation>\n<object>\n</annotation>", r"a.xml:3: not valid XML: mismatched tag"),
    ("", r"a.xml:1: not valid XML: no element found"),
    ("\n\n<other/>", r"a.xml:3: <other> where <annotation> is expected"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>\n<annotation/>', r"a.xml:1: a document type is not allowed"),
    ("<annotation>&lol;</annotation>", r"a.xml:1: not valid XML: undefined entity"),
    ('<?xml version="1.0" encoding="no-such"?><annotation/>', r"a.xml:1: not valid XML"),
    ("<a>" * 30 + "</a>" * 30, r"a.xml:1: nested deeper"),
    ("<annotation>" + " " * 5_000_000 + "</annotation>", r"a.xml: larger than 5 MB"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN_XML)
def test_broken_xml_is_refused_with_its_file_and_line(tmp_path, text, message):
    write(voc_set(tmp_path) / "Annotations/a.xml", text)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


GOOD = """<annotation>
<object>
<name>cat</name>
<bndbox>
<xmin>5</xmin>
<ymin>5</ymin>
<xmax>9</xmax>
<ymax>9</ymax>
</bndbox></object></annotation>"""
BROKEN_OBJECTS = [
    ("<xmax>9", "<xmax>nine", r"a.xml:7: object 1: xmax is 'nine', not a number"),
    ("<xmax>9", "<xmax>nan", r"a.xml:7: object 1: xmax is 'nan', not a number"),
    ("<xmax>9", "<xmax>", r"a.xml:7: object 1: xmax is '', not a number"),
    ("<ymin>5</ymin>", "", r"a.xml:4: object 1 has no ymin"),
    ("bndbox", "box", r"a.xml:2: object 1 has no bndbox"),
    ("cat", " ", r"a.xml:2: object 1 has no name"),
    ("</name>", "</name><difficult>perhaps</difficult>", r"a.xml:2: object 1: difficult is 'perhaps', not 0 or 1"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN_OBJECTS)
def test_a_broken_object_is_refused_with_its_line_number_and_key(tmp_path, old, new, message):
    write(voc_set(tmp_path) / "Annotations/a.xml", GOOD)
    assert of(load(tmp_path), "a").boxes_xyxy.tolist() == [[4, 4, 9, 9]]
    write(tmp_path / "Annotations/a.xml", GOOD.replace(old, new))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def edges(xmin, ymin, xmax, ymax):
    return writers.write_voc_xml(torch.tensor([[xmin, ymin, xmax, ymax]]).float(), ["cat"], SIZE, "a.jpg")


@pytest.mark.parametrize("box", [(60, 0, 70, 9), (-9, 0, 0, 9), (0, 40, 9, 50), (0, -9, 9, 0)])
def test_a_box_wholly_outside_is_refused(tmp_path, box):
    write(voc_set(tmp_path) / "Annotations/a.xml", edges(*box))
    with pytest.raises(DataError, match=r"a.xml:\d: object 1: the box .* lies outside the photo of 60 x 40 px"):
        load(tmp_path)


def test_a_box_that_reaches_out_is_clipped_and_counted(tmp_path, capsys):
    write(voc_set(tmp_path) / "Annotations/a.xml", edges(-5, 10, 20, 90))
    write(tmp_path / "Annotations/b.xml", edges(59, -1, 99, 1))
    console.set_level(quiet=False, verbose=True)
    found = load(tmp_path)
    assert of(found, "a").boxes_xyxy.tolist() == [[0, 10, 20, 40]]
    assert of(found, "b").boxes_xyxy.tolist() == [[59, 0, 60, 1]]
    err = capsys.readouterr().err
    assert f"clipped at the edge of their photo: 2, the first in {tmp_path}/Annotations/a.xml" in err
    console.set_level(quiet=False, verbose=False)
    load(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("box", [(9, 5, 9, 9), (5, 9, 9, 9), (9, 9, 5, 5)])
def test_a_box_without_area_is_left_out_and_counted(tmp_path, capsys, box):
    xmin, ymin, xmax, ymax = box
    text = GOOD.replace(">9</xmax>", f">{xmax}</xmax>").replace(">9</ymax>", f">{ymax}</ymax>")
    text = text.replace(">5</xmin>", f">{xmin}</xmin>").replace(">5</ymin>", f">{ymin}</ymin>")
    voc_set(tmp_path)
    for name in "bc":
        write(tmp_path / f"Annotations/{name}.xml", text)
    found = load(tmp_path)
    assert len(of(found, "a").labels) == 3
    assert of(found, "b").boxes_xyxy.shape == (0, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"warning: boxes: boxes without area left out: 2, the first in {tmp_path}/Annotations/b.xml"]


@pytest.mark.parametrize("bbox", [[5, 5, 0, 9], [5, 5, 9, 0], [5, 5, -1, 9], [5, 5, 9, -1]])
def test_a_box_without_area_in_coco_and_yolo(tmp_path, capsys, bbox):
    path = coco_set(tmp_path / "coco") / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["bbox"] = bbox
    path.write_text(json.dumps(content))
    fractions = " ".join(str(side / 60) for side in bbox)
    write(yolo_set(tmp_path / "yolo") / "labels/train/a.txt", f"1 .5 .5 .5 .5\n0 {fractions}\n1 .5 .5 .2 .2\n")
    assert of(load(tmp_path / "coco"), "a").labels.tolist() == [1, 1]
    assert of(load(tmp_path / "yolo"), "a").labels.tolist() == [1, 1]
    assert capsys.readouterr().err.count("boxes without area left out: 1, the first in") == 2


@pytest.mark.parametrize(("size", "odd"), [((0, 0), 0), ((60, 0), 0), (SIZE, 0), ((40, 60), 1), ((600, 400), 1)])
def test_a_size_that_lies(tmp_path, capsys, size, odd):
    write(voc_set(tmp_path) / "Annotations/a.xml", writers.write_voc_xml(BOXES, ["cat"] * 3, size, "a.jpg"))
    assert torch.equal(of(load(tmp_path), "a").boxes_xyxy, BOXES)
    assert capsys.readouterr().err.count("photos of another size than their annotation claims") == odd


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pillow_turns_photos(orientation):
    array = np.zeros((40, 60), np.uint8)
    array[5:30, 4:20] = 255
    image = Image.fromarray(array)
    image.getexif()[Base.Orientation] = orientation
    rows, columns = np.nonzero(np.asarray(ImageOps.exif_transpose(image)))
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert dataset.turned(BOXES[:1], orientation, SIZE)[0].tolist() == expected


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize(("orientation", "size", "turns"), [(6, SIZE, True), (6, (40, 60), False), (3, SIZE, False)])
def test_boxes_turn_with_a_photo_where_they_were_drawn_unturned(tmp_path, ending, orientation, size, turns):
    voc_set(tmp_path, ending=ending)
    photo(tmp_path / "JPEGImages" / f"a{ending}", orientation=orientation)
    box = torch.tensor([[4.0, 5.0, 20.0, 30.0]])
    write(tmp_path / "Annotations/a.xml", writers.write_voc_xml(box, ["cat"], size, "a.jpg"))
    found = load(tmp_path)
    item = of(found, "a")
    assert torch.equal(item.boxes_xyxy, dataset.turned(box, orientation, SIZE) if turns else box)
    width, height = found.load(item).size
    assert (item.boxes_xyxy[:, 0::2] <= width).all()
    assert (item.boxes_xyxy[:, 1::2] <= height).all()


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", ".png"), ("P", ".png"), ("1", ".png"), ("L", ".jpg"), ("CMYK", ".jpg")]
)
def test_grey_and_palette_photos(tmp_path, mode, ending):
    voc_set(tmp_path, ending=ending)
    photo(tmp_path / "JPEGImages" / f"a{ending}", mode=mode)
    found = load(tmp_path)
    assert torch.equal(of(found, "a").boxes_xyxy, BOXES)
    assert found.load(of(found, "a")).mode == "RGB"


def test_headers_agree_with_decoded_photos(tmp_path):
    for orientation in (None, 1, 6):
        for ending in photos.SUFFIXES[:3] + photos.SUFFIXES[4:]:
            path = photo(tmp_path / f"x{ending}", orientation=orientation)
            found = annotations.header(path)
            shown = (found.height, found.width) if found.orientation >= 5 else (found.width, found.height)
            assert shown == photos.load(path).size
    late = tmp_path / "late.png"  # a PNG whose EXIF comes after its pixels
    raw = photo(tmp_path / "y.png", orientation=6).read_bytes()
    start = raw.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(raw[start : start + 4], "big")
    late.write_bytes(raw[:start] + raw[end:-12] + raw[start:end] + raw[-12:])
    assert annotations.header(late).orientation == 6
    assert photos.load(late).size == (40, 60)


def test_what_is_missing_is_named(tmp_path):
    folder = voc_set(tmp_path)
    (folder / "JPEGImages/b.jpg").rename(tmp_path / "b")
    with pytest.raises(DataError, match=r"train.txt:2: .*JPEGImages has no photo b;"):
        load(tmp_path)
    (tmp_path / "b").rename(folder / "JPEGImages/b.jpg")
    (folder / "Annotations/c.xml").unlink()
    with pytest.raises(DataError, match=r"Annotations/c.xml: No such file"):
        load(tmp_path)
    write(folder / "ImageSets/Main/test.txt", "a\n\na\n")
    with pytest.raises(DataError, match=r"test.txt:3: a for the second time"):
        load(tmp_path)
    (folder / "ImageSets/Main/test.txt").unlink()
    write(folder / "JPEGImages/a.jpg", "no photo")
    with pytest.raises(DataError, match=r"a.jpg: not a photo that can be read"):
        load(tmp_path)
    (folder / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match=r"train.txt: no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", r"a.txt:2: 4 words where `class x y w h`"),
        ("0 .1 .1 .2 .2 .3 .3", r"a.txt:2: 7 words .*outlines and points are not boxes"),
        ("2 0.5 0.5 0.5 0.5", r"a.txt:2: class '2' is none of 0..1"),
        ("-1 0.5 0.5 0.5 0.5", r"a.txt:2: class '-1' is none"),
        ("0 0.5 0.5 wide 0.5", r"a.txt:2: w is 'wide', not a number"),
        ("0 0.5 1.5 0.5 0.5", r"a.txt:2: the box .* lies outside the photo of 60 x 40"),
    ],
)
def test_broken_yolo(tmp_path, line, message):
    write(yolo_set(tmp_path) / "labels/train/a.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_broken_yolo_folders(tmp_path):
    write(yolo_set(tmp_path) / "data.yaml", "names: 3\n")
    with pytest.raises(DataError, match=r"data.yaml:1:1: names is no list"):
        load(tmp_path)
    write(tmp_path / "data.yaml", "names: [a,\n")
    with pytest.raises(DataError, match=r"data.yaml:\d:\d+: not valid YAML"):
        load(tmp_path)
    write(tmp_path / "data.yaml", "names: [dog, dog]\n")
    with pytest.raises(DataError, match=r"the class 'dog' is named twice"):
        load(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"neither data\.yaml nor classes\.txt"):
        load(tmp_path)
    write(tmp_path / "classes.txt", "dog\ncat\n")
    write(tmp_path / "labels/train/z.txt", "")
    with pytest.raises(DataError, match=r"z.txt: .*images/train has no photo z"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotations\[1\]: bbox is not a list of four numbers"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, "3", 4]),
            r"annotations\[1\]: bbox\[2\] is '3', not a number",
        ),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, True, 4]), r"annotations\[1\]: bbox\[2\] is 'True'"),
        (lambda c: c["annotations"][0].update(image_id=9), r"annotations\[0\]: image_id is that of no image"),
        (lambda c: c["annotations"][0].update(category_id=9), r"annotations\[0\]: category_id 9 is in no category"),
        (lambda c: c["annotations"][0].update(bbox=[70, 2, 3, 4]), r"annotations\[0\]: the box .* lies outside"),
        (lambda c: c["images"][1].update(file_name="z.jpg"), r"the photo 'z.jpg' is not there"),
        (lambda c: c["images"][1].update(id=1), r"images\[1\]: id is no whole number of its own"),
        (lambda c: c["images"][1].pop("file_name"), r"image 2 has no file_name"),
        (lambda c: c.pop("categories"), r"has no list of categories"),
    ],
)
def test_broken_coco(tmp_path, change, message):
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
        ("[]", "its top is no object"),
        ("[" * 99999, "not valid JSON"),
        ('{"images": [NaN]}', "NaN is not a number"),
    ],
)
def test_broken_json(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "t.json", text))


def test_what_cannot_be_a_set(tmp_path):
    with pytest.raises(ConfigError, match="path is missing"):
        dataset.load("boxes", tmp_path)
    with pytest.raises(ConfigError, match="path goes with name: boxes"):
        dataset.load("bccd", tmp_path, str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'bccd'"):
        dataset.load("bcd", tmp_path)
    with pytest.raises(DataError, match=r"fruit is not in .*cvlab data fetch fruit"):
        dataset.load("fruit", tmp_path)
    with pytest.raises(DataError, match="gone: no such file or folder"):
        load(tmp_path / "gone")
    with pytest.raises(DataError, match=r"in none of the layouts.*VOC .*YOLO .*COCO"):
        load(tmp_path)
    voc_set(tmp_path)
    for name in "abc":
        write(tmp_path / f"Annotations/{name}.xml", "<annotation/>")
    with pytest.raises(DataError, match="no object in any photo"):
        load(tmp_path)
    write(tmp_path / "ImageSets/Main/train.txt", "")
    with pytest.raises(DataError, match=r"no photos to train on; the VOC layout has 0 photos in train"):
        load(tmp_path)


def fruit(folder):
    voc_set(folder)
    for k, name in enumerate("abc"):
        xml = writers.write_voc_xml(BOXES[:1], [("apple", "banana", "orange")[k]], SIZE, f"{name}.jpg")
        write(folder / f"Annotations/{name}.xml", xml)
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for one in sorted(folder.rglob("*")):
            file.write(one, one.relative_to(folder))
    return path


def test_a_small_set_is_taken_from_a_folder_or_a_zip_file(tmp_path, monkeypatch, capsys):
    source = fruit(tmp_path / "source/VOC/fruit")
    path = source / "Annotations/a.xml"
    path.write_text(
        path.read_text().replace("</annotation>", GOOD.split("\n", 1)[1].replace("9", "5").replace("cat", "apple"))
    )
    origins = (tmp_path / "source", source, zipped(tmp_path / "source", tmp_path / "fruit.zip"))
    for number, origin in enumerate(origins):
        root = tmp_path / f"root{number}"
        monkeypatch.setenv("CVLAB_DATA", str(root))
        capsys.readouterr()
        assert catalog.fetch("fruit", origin)["found"].startswith("3 photos, 3 boxes, 3 classes")
        assert capsys.readouterr().err.count("warning") == 1, "told once, of the file that stays"
        assert catalog.check("fruit") == {"fruit": "3 photos, 3 boxes, 3 classes, every annotation can be read"}
        assert [path.name for path in root.iterdir()] == ["VOC"]
        assert datasets.get("fruit").load(root).classes == ("apple", "banana", "orange")
    catalog.fetch("fruit", source)  # over what is there


def test_wrong_origins_install_nothing(tmp_path):
    other = voc_set(tmp_path / "other")
    broken = fruit(tmp_path / "broken")
    write(broken / "Annotations/c.xml", "<annotation>")
    fruit(tmp_path / "several/one")
    fruit(tmp_path / "several/two")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "no.zip", "x")
    cases = {"other": "its classes are cat, dog", "broken": "c.xml:1: not valid XML", "several": "several sets"}
    cases |= {"empty": "no set in VOC's layout", "gone": "no set", "no.zip": "cannot be unpacked"}
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            downloads.fetch_small("fruit", tmp_path / "root", tmp_path / name, True)
        assert not list((tmp_path / "root").rglob("*")), name
    assert other.is_dir()


def test_zip_files_cannot_write_outside_or_link(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    for name in ("../out", "/out", "a/../../out", link):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
            file.writestr(name, "x")
        with pytest.raises(DataError, match=r"would be written outside|not a plain file"):
            zipfiles.extract(tmp_path / "bad.zip", tmp_path / "to/here", max_bytes=10, max_members=1)
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", "x" * 10_000)
        file.writestr("b", "x")
    for limits, message in (((9_999, 2), "more than 9999 bytes"), ((20_000, 1), "more than 1 members")):
        with pytest.raises(DataError, match=message):
            zipfiles.extract(tmp_path / "big.zip", tmp_path / "to", max_bytes=limits[0], max_members=limits[1])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "to" / "link").exists()


def served(monkeypatch, content):
    """Let a download write what `content` gives for its first address."""
    asked = []

    def fetch(urls, target, sha256, size, patient):
        asked.append(urls[0])
        write(target, "")
        target.write_bytes(content(target))
        download.verify(target, sha256)
        return target

    monkeypatch.setattr(download, "fetch", fetch)
    return asked


def test_bccd_comes_from_github_whole(tmp_path, monkeypatch):
    source = tmp_path / "made/BCCD_Dataset-master/BCCD"
    voc_set(source)
    for name in "abc":
        xml = writers.write_voc_xml(BOXES, ["RBC", "WBC", "Platelets"], SIZE, "x.jpg")
        write(source / f"Annotations/{name}.xml", xml)
    archive = zipped(tmp_path / "made", tmp_path / "made.zip").read_bytes()
    asked = served(monkeypatch, lambda target: archive)
    with pytest.raises(DataError, match="3 photos where bccd has 364"):
        downloads.BCCD.fetch(tmp_path / "root", None, True)
    assert not downloads.BCCD.ready(tmp_path / "root")
    assert not list((tmp_path / "root/downloads").iterdir())
    monkeypatch.setattr(downloads, "BCCD_PHOTOS", 3)
    downloads.BCCD.fetch(tmp_path / "root", None, True)
    assert downloads.BCCD.ready(tmp_path / "root")
    assert asked[0].startswith("https://github.com/Shenggan/BCCD_Dataset/")
    with pytest.raises(DataError, match=r"published nowhere that stays; `cvlab data fetch fruit --from"):
        downloads.FRUIT.fetch(tmp_path / "root", None, True)


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Small archives of VOC 2007 with their checksums, and the folder of them."""
    voc_set(tmp_path / "trainval/VOCdevkit/VOC2007")
    voc_set(tmp_path / "test/VOCdevkit/VOC2007", names=("x", "y"))
    (tmp_path / "trainval/VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    write(tmp_path / "trainval/VOCdevkit/VOC2007/ImageSets/Main/val.txt", "c\n")
    (tmp_path / "test/VOCdevkit/VOC2007/ImageSets/Main/train.txt").unlink()
    write(tmp_path / "trainval/VOCdevkit/VOC2007/SegmentationClass/a.png", "not needed")
    made = []
    for one, name in zip(downloads.ARCHIVES, ("trainval", "test"), strict=True):
        (tmp_path / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "tars" / one.name, "w") as tar:
            tar.add(tmp_path / name / "VOCdevkit", "VOCdevkit")
        raw = (tmp_path / "tars" / one.name).read_bytes()
        raw += bytes(512 * (name == "test"))  # of another size, by which they are told apart
        (tmp_path / "tars" / one.name).write_bytes(raw)
        made.append(dataclasses.replace(one, sha256=hashlib.sha256(raw).hexdigest(), size=len(raw)))
    monkeypatch.setattr(downloads, "ARCHIVES", tuple(made))
    return tmp_path / "tars"


def test_voc07_is_installed_from_every_form(tmp_path, monkeypatch, tars):
    asked = served(monkeypatch, lambda target: (tars / target.name).read_bytes())
    downloads.VOC07.fetch(tmp_path / "net", None, True)
    assert [url.rpartition("/")[2] for url in asked] == [one.name for one in downloads.ARCHIVES]
    downloads.VOC07.fetch(tmp_path / "folder", tars, True)
    downloads.VOC07.fetch(tmp_path / "unpacked", tmp_path / "net", True)
    for one in downloads.ARCHIVES:
        downloads.VOC07.fetch(tmp_path / "single", tars / one.name, True)
    for name in ("net", "folder", "unpacked", "single"):
        found = downloads.VOC07.load(tmp_path / name)
        assert found.classes == dataset.VOC_CLASSES
        assert len(found.classes) == 20
        stems = {split: [item.path.stem for item in items] for split, items in found.splits.items()}
        assert stems == {"train": ["a", "b"], "val": ["c"], "test": ["y"]}, name
        assert found.classes[of(found, "a").labels[1]] == "dog"
        assert not (tmp_path / name / "VOCdevkit/VOC2007/SegmentationClass").exists()
    assert [path.name for path in (tmp_path / "net/downloads").iterdir()] == []
    shutil.move(tmp_path / "net/VOCdevkit", tmp_path / "net/VOC")
    assert downloads.VOC07.ready(tmp_path / "net"), "VOC/VOC2007 is taken too"


def test_voc07_is_refused_where_it_is_altered(tmp_path, tars):
    path = tars / downloads.ARCHIVES[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="differs from the published file"):
        downloads.VOC07.fetch(tmp_path / "root", path, True)
    assert not (tmp_path / "root").exists()


def test_a_class_that_voc_does_not_have(tmp_path):
    folder = voc_set(tmp_path / "VOCdevkit/VOC2007")
    write(folder / "Annotations/a.xml", GOOD.replace("cat", "cta"))
    with pytest.raises(DataError, match=r"a.xml:2: object 1: unknown class 'cta'; did you mean 'cat'"):
        dataset.load("voc07", tmp_path)


def test_sources_are_as_published():
    assert [one.urls[0] for one in downloads.ARCHIVES] == [
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar",
    ]
    for one in downloads.ARCHIVES:
        assert len(one.sha256) == 64
        assert all(url.startswith("https://") for url in one.urls[1:])


def test_every_set_is_listed_and_classify_takes_none_with_boxes(cvlab, tmp_path):
    rows = {row["name"]: row for row in catalog.data_lines()}
    assert set(rows) >= {"cifar10", "scenes10", "scenes", "fruit", "bccd", "voc07", "boxes"}
    assert rows["boxes"]["state"] == "your own"
    assert rows["fruit"]["state"] == "not on the disk"
    assert datasets.names(ImageDatasetSource) == ["cifar10", "scenes10"]
    for name in datasets.names(dataset.DetectionDatasetSource):
        code, _, err = cvlab("train", "quickstart", f"data.name={name}", "-q")
        assert code == 2
        assert f"data set '{name}' has photos with boxes" in err
        assert "known: cifar10, scenes10" in err
    code, _, err = cvlab("train", "quickstart", "data.name=cifar", "-q")
    assert code == 2
    assert "did you mean 'cifar10'? known: cifar10, scenes10" in err
    code, _, err = cvlab("data", "fetch", "boxes")
    assert code == 2
    assert "path is missing" in err


@pytest.mark.parametrize("orientation", [None, 6])
def test_reading_is_quick(tmp_path, orientation):
    folder = voc_set(tmp_path, names=[f"n{k}" for k in range(150)])
    photo(folder / "JPEGImages/n0.jpg", orientation=orientation)
    load(tmp_path)
    began = time.process_time()
    load(tmp_path)
    assert (time.process_time() - began) / 150 < 0.004, "about 0.5 ms each where nothing else runs"


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "sizes", "boxes"), [("fruit", [192, 48, 60], 582), ("bccd", [205, 87, 72], 4886)])
def test_the_real_sets(name, sizes, boxes, capsys):
    root = Path(REAL_DATA or "none")
    if not downloads.ready(name, root):
        pytest.skip(f"CVLAB_DATA has no VOC/{name}")
    found = dataset.load(name, root)
    items = [item for split in found.splits.values() for item in split]
    assert found.classes == downloads.CLASSES[name]
    assert [len(split) for split in found.splits.values()] == sizes
    assert sum(len(item.labels) for item in items) == boxes
    for item in items[::17]:
        expected = slow_twin(root / f"VOC/{name}/Annotations/{item.path.stem}.xml")
        assert [
            (found.classes[k], *box) for k, box in zip(item.labels, item.boxes_xyxy.tolist(), strict=True)
        ] == expected
    err = capsys.readouterr().err
    assert ("boxes without area left out: 2, the first in" in err) == (name == "bccd")
    assert err.count("\n") == (name == "bccd")


def slow_twin(path):
    """Read an annotation by the standard library alone."""
    found = []
    for one in ElementTree.parse(path).getroot().iter("object"):
        xmin, ymin, xmax, ymax = (float(one.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
        if xmax > xmin and ymax > ymin:
            found.append((one.findtext("name"), xmin - 1, ymin - 1, xmax, ymax))
    return found
