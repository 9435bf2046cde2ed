"""Samples from annotations: boxes are clipped, dropped, rotated and counted; the validation split; user data."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from cvlab import console
from cvlab.api import catalog
from cvlab.data import datasets
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.data import dataset, writers
from tests.experiments.detection.data.box_files import (
    BOXES,
    SIZE,
    VOC_XML,
    coco_set,
    find_sample,
    load,
    voc_set,
    write,
    write_photo,
    yolo_set,
)


def test_the_validation_split_is_a_fixed_random_sample(tmp_path):
    voc_set(tmp_path, names=[f"n{k:02d}" for k in range(21)])
    loaded, reloaded = load(tmp_path, val_fraction=0.25), load(tmp_path, val_fraction=0.25)
    names = [item.path.stem for split in ("train", "val") for item in loaded.splits[split]]
    assert sorted(names) == [f"n{k:02d}" for k in range(20)] != names
    assert len(loaded.splits["val"]) == 5
    assert [item.path.stem for item in loaded.splits["test"]] == ["n20"]
    assert names == [item.path.stem for split in ("train", "val") for item in reloaded.splits[split]]
    shorter = load(tmp_path, val_fraction=0.1)
    assert [item.path.stem for item in shorter.splits["val"]] == names[-2:], "the last ones in the same order"
    write(tmp_path / "ImageSets/Main/val.txt", "n20\n")
    assert [item.path.stem for item in load(tmp_path).splits["train"]] == [f"n{k:02d}" for k in range(20)]


def edges(xmin, ymin, xmax, ymax):
    return writers.write_voc_xml(torch.tensor([[xmin, ymin, xmax, ymax]]).float(), ["cat"], SIZE, "a.jpg")


@pytest.mark.parametrize("box", [(60, 0, 70, 9), (-9, 0, 0, 9), (0, 40, 9, 50), (0, -9, 9, 0)])
def test_a_box_outside_its_image_is_left_out_and_counted(tmp_path, capsys, box):
    write(voc_set(tmp_path) / "Annotations/a.xml", edges(*box))
    assert len(find_sample(load(tmp_path), "a").boxes_xyxy) == 0
    assert f"boxes outside their photo left out: 1 ({tmp_path}/Annotations/a.xml:4)" in capsys.readouterr().err


def test_a_box_beyond_the_edge_is_clipped_and_counted(tmp_path, capsys):
    write(voc_set(tmp_path) / "Annotations/a.xml", edges(-5, 10, 20, 90))
    write(tmp_path / "Annotations/b.xml", edges(59, -1, 99, 1))
    console.set_level(quiet=False, verbose=True)
    loaded = load(tmp_path)
    assert find_sample(loaded, "a").boxes_xyxy.tolist() == [[0, 10, 20, 40]]
    assert find_sample(loaded, "b").boxes_xyxy.tolist() == [[59, 0, 60, 1]]
    err = capsys.readouterr().err
    assert f"clipped at the edge of their photo: 2 ({tmp_path}/Annotations/a.xml:4, " in err
    console.set_level(quiet=False, verbose=False)
    load(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("box", [(9, 5, 9, 9), (5, 9, 9, 9), (9, 9, 5, 5)])
def test_a_box_without_area_is_dropped_and_counted(tmp_path, capsys, box):
    xmin, ymin, xmax, ymax = box
    text = VOC_XML.replace(">9</xmax>", f">{xmax}</xmax>").replace(">9</ymax>", f">{ymax}</ymax>")
    text = text.replace(">5</xmin>", f">{xmin}</xmin>").replace(">5</ymin>", f">{ymin}</ymin>")
    voc_set(tmp_path)
    for name in "bc":
        write(tmp_path / f"Annotations/{name}.xml", text)
    loaded = load(tmp_path)
    assert len(find_sample(loaded, "a").labels) == 3
    assert find_sample(loaded, "b").boxes_xyxy.shape == (0, 4)
    positions = f"{tmp_path}/Annotations/b.xml:2, {tmp_path}/Annotations/c.xml:2"
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"warning: boxes: boxes without area left out: 2 ({positions})"]


@pytest.mark.parametrize("bbox", [[5, 5, 0, 9], [5, 5, 9, 0], [5, 5, -1, 9], [5, 5, 9, -1]])
def test_a_box_without_area_in_coco_and_yolo(tmp_path, capsys, bbox):
    path = coco_set(tmp_path / "coco") / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["bbox"] = bbox
    path.write_text(json.dumps(content))
    fractions = " ".join(str(side / 60) for side in bbox)
    write(yolo_set(tmp_path / "yolo") / "labels/train/a.txt", f"1 .5 .5 .5 .5\n0 {fractions}\n1 .5 .5 .2 .2\n")
    assert find_sample(load(tmp_path / "coco"), "a").labels.tolist() == [1, 1]
    assert find_sample(load(tmp_path / "yolo"), "a").labels.tolist() == [1, 1]
    assert capsys.readouterr().err.count("boxes without area left out: 1 (") == 2


@pytest.mark.parametrize(("size", "warnings"), [((0, 0), 0), ((60, 0), 0), (SIZE, 0), ((40, 60), 1), ((600, 400), 1)])
def test_a_wrong_size_in_an_annotation_is_reported(tmp_path, capsys, size, warnings):
    write(voc_set(tmp_path) / "Annotations/a.xml", writers.write_voc_xml(BOXES, ["cat"] * 3, size, "a.jpg"))
    assert torch.equal(find_sample(load(tmp_path), "a").boxes_xyxy, BOXES)
    assert capsys.readouterr().err.count("photos of another size than their annotation claims") == warnings


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_exif_orientation(orientation):
    array = np.zeros((40, 60), np.uint8)
    array[5:30, 4:20] = 255
    image = Image.fromarray(array)
    image.getexif()[Base.Orientation] = orientation
    rows, columns = np.nonzero(np.asarray(ImageOps.exif_transpose(image)))
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert dataset.apply_orientation(BOXES[:1], orientation, SIZE)[0].tolist() == expected


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize(("orientation", "size", "rotated"), [(6, SIZE, True), (6, (40, 60), False), (3, SIZE, False)])
def test_boxes_drawn_on_stored_pixels_are_rotated_with_the_photo(tmp_path, ending, orientation, size, rotated):
    voc_set(tmp_path, ending=ending)
    write_photo(tmp_path / "JPEGImages" / f"a{ending}", orientation=orientation)
    box = torch.tensor([[4.0, 5.0, 20.0, 30.0]])
    write(tmp_path / "Annotations/a.xml", writers.write_voc_xml(box, ["cat"], size, "a.jpg"))
    loaded = load(tmp_path)
    item = find_sample(loaded, "a")
    assert torch.equal(item.boxes_xyxy, dataset.apply_orientation(box, orientation, SIZE) if rotated else box)
    width, height = loaded.load(item).size
    assert (item.boxes_xyxy[:, 0::2] <= width).all()
    assert (item.boxes_xyxy[:, 1::2] <= height).all()


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", ".png"), ("P", ".png"), ("1", ".png"), ("L", ".jpg"), ("CMYK", ".jpg")]
)
def test_gray_and_palette_photos(tmp_path, mode, ending):
    voc_set(tmp_path, ending=ending)
    write_photo(tmp_path / "JPEGImages" / f"a{ending}", mode=mode)
    loaded = load(tmp_path)
    assert torch.equal(find_sample(loaded, "a").boxes_xyxy, BOXES)
    assert loaded.load(find_sample(loaded, "a")).mode == "RGB"


def test_invalid_data_sets_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="path is missing"):
        dataset.load("boxes", tmp_path)
    with pytest.raises(ConfigError, match="path requires name: boxes"):
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


def test_every_data_set_is_listed_and_classify_rejects_detection_data(cvlab, tmp_path):
    rows = {row["name"]: row for row in catalog.data_lines()}
    assert set(rows) >= {"cifar10", "scenes10", "scenes", "fruit", "bccd", "voc07", "boxes"}
    assert rows["boxes"]["state"] == "your own"
    assert rows["fruit"]["state"] == "not on the disk"
    for name in datasets.DATASETS:
        assert name in datasets.BY_KIND[datasets.get(name).kind]
    assert list(datasets.BY_KIND["images"]) == [
        *("cifar10", "cifar100", "mnist", "mnist5k", "fashion_mnist", "svhn", "imagenette", "scenes10", "folder")
    ]
    for name in datasets.BY_KIND["boxes"]:
        code, _, err = cvlab("train", "quickstart", f"data.name={name}", "-q")
        assert code == 2
        assert f"data set '{name}' has photos with boxes" in err
        assert "known: cifar10, cifar100, fashion_mnist" in err
    code, _, err = cvlab("train", "quickstart", "data.name=cifar", "-q")
    assert code == 2
    assert "did you mean 'cifar10'? known: cifar10, cifar100, fashion_mnist" in err
    code, _, err = cvlab("data", "fetch", "boxes")
    assert code == 2
    assert "path is missing" in err


@pytest.mark.parametrize("orientation", [None, 6])
def test_reading_is_fast(tmp_path, orientation):
    folder = voc_set(tmp_path, names=[f"n{k}" for k in range(150)])
    write_photo(folder / "JPEGImages/n0.jpg", orientation=orientation)
    load(tmp_path)
    start_time = time.process_time()
    load(tmp_path)
    assert (time.process_time() - start_time) / 150 < 0.004, "about 0.5 ms each on an idle machine"
