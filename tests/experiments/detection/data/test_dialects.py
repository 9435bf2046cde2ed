"""Variants written by annotation programs: repaired or left out, and reported with counts and positions."""

import json
import os
import shutil

import pytest
import torch

from cvlab.data import photo_paths
from cvlab.errors import DataError
from tests.experiments.detection.data.box_files import (
    BOXES,
    coco_set,
    find_sample,
    load,
    voc_set,
    write,
    write_photo,
    yolo_set,
)


def counts(dataset):
    return [len(samples) for samples in dataset.splits.values()]


def names(dataset, split):
    return sorted(sample.path.name for sample in dataset.splits[split])


def xml_object(name="cat", edges=(5, 6, 20, 30), extra=""):
    box = "".join(f"<{key}>{edge}</{key}>" for key, edge in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>"


def xml(*objects, before=""):
    return f"<annotation>{before}\n" + "\n".join(objects) + "\n</annotation>"


# data.yaml: the photos of each split


def photos_with_labels(folder, *stems, ending=".png", label_ending=".txt"):
    for stem in stems:
        write_photo(folder / f"{stem}{ending}")
        labels = folder.as_posix().replace("images", "labels") if "images" in folder.parts else folder
        write(type(folder)(labels) / f"{stem}{label_ending}", "0 .5 .5 .5 .5\n1 .3 .3 .2 .2\n")


YAML_LAYOUTS = {  # name -> the split entries of data.yaml; the photos lie in images/{a,b,c}, d in images/d/deep
    "folders": "train: images/a\nval: images/b\ntest: images/c\n",
    "path": "path: .\ntrain: ./images/a\nval: ./images/b\ntest: ./images/c/\n",
    "path of another machine": "path: /content/set\ntrain: images/a\nval: images/b\ntest: images/c\n",
    "absolute paths of another machine": "train: /content/s/images/a\nval: /content/s/images/b\ntest: /x/images/c\n",
    "Roboflow": "train: ../images/a\nval: ../images/b\ntest: ../images/c\n",
    "backslashes": "train: images\\a\nval: images\\b\ntest: images\\c\n",
    "list": "train: [images/a]\nval:\n- images/b\ntest: [images/c]\n",
    "txt": "train: a.txt\nval: lists/b.txt\ntest: [a/c.TXT]\n",
    "valid": "train: images/a\nvalid: images/b\ntest: images/c\n",
    "pattern": "train: images/a/*.png\nval: images/b/*\ntest: images/[c]\n",
    "no test on the disk": "train: images/a\nval: images/b\ntest: ../nowhere/images\n",
}


@pytest.mark.parametrize("file", ["data.yaml", "custom.yaml", "custom.yml", "SET.YAML"])
@pytest.mark.parametrize("layout", YAML_LAYOUTS)
def test_the_splits_equal_those_of_data_yaml(tmp_path, layout, file):
    for split, stems in {"a": ("a1", "a2"), "b": ("b1",), "c": ("c1", "c2", "c3")}.items():
        photos_with_labels(tmp_path / "images" / split, *stems)
    photos_with_labels(tmp_path / "images/train", "stray")  # in no split, despite the name of its folder
    write(tmp_path / "a.txt", "./images/a/a1.png\nimages/a/a2.png\n")
    write(tmp_path / "lists/b.txt", "/old/machine/images/b/b1.png\n")
    write(tmp_path / "a/c.TXT", "images\\c\\c1.png\n../images/c/c2.png\nimages/c/c3.png\n")
    text = f"nc: 2\nnames: [dog, cat]\n{YAML_LAYOUTS[layout]}"
    path = write(tmp_path / file, text)
    if file != "data.yaml":
        write(tmp_path / "data.yaml", "train: images/train\nval: images/train\nnames: [x, y]\n")
    dataset = load(tmp_path if file == "data.yaml" else path)
    assert dataset.classes == ("dog", "cat")
    assert counts(dataset) == [2, 1, 0 if layout == "no test on the disk" else 3]
    assert names(dataset, "train") == ["a1.png", "a2.png"]
    assert names(dataset, "val") == ["b1.png"]
    assert all(len(sample.labels) == 2 for samples in dataset.splits.values() for sample in samples)


def test_several_folders_and_subfolders_of_a_split(tmp_path):
    photos_with_labels(tmp_path / "images/train", "a")
    photos_with_labels(tmp_path / "images/train/day 1/left", "b", "c")
    photos_with_labels(tmp_path / "images/more", "d", label_ending=".TXT", ending=".JPG")
    photos_with_labels(tmp_path / "images/val/deep", "e")
    write(tmp_path / "data.yaml", "train: [images/train, images/more]\nval: images/val\nnames: {0: dog, 1: cat}\n")
    dataset = load(tmp_path)
    assert names(dataset, "train") == ["a.png", "b.png", "c.png", "d.JPG"]
    assert names(dataset, "val") == ["e.png"]
    assert all(len(sample.labels) == 2 for samples in dataset.splits.values() for sample in samples)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: gone\nval: images/b\n", r"data.yaml:1:8: train: gone: no such folder or list"),
        ("train: images/a\nval: gone\n", r"data.yaml:2:6: val: gone: no such folder or list"),
        ("train: {a: b}\n", r"data.yaml:1:8: train is no path and no list of paths"),
        ("val: images/b\n", r"data.yaml: has no `train`"),
        ("train: gone.txt\n", r"data.yaml:1:8: train: gone.txt: no such folder or list"),
        ("train: empty.txt\n", r"empty.txt: none of its photos is on the disk"),
        ("train: images/a\ntrain: images/b\n", r"data.yaml:2:1: duplicate key 'train'"),
        ("train: images/a\nnc: 3\n", r"data.yaml:2:5: nc is 3, but names has 2 classes"),
    ],
)
def test_invalid_entries_of_data_yaml_are_rejected(tmp_path, text, message):
    photos_with_labels(tmp_path / "images/a", "a")
    photos_with_labels(tmp_path / "images/b", "b")
    write(tmp_path / "empty.txt", "gone.png\n")
    write(tmp_path / "data.yaml", f"{text}names: [dog, cat]\n")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("entries", ["train: images/a\n", "train: a.txt\n", "train: [images/a]\nval: images/a\n"])
def test_photos_outside_the_splits_of_data_yaml_are_reported(tmp_path, capsys, entries):
    photos_with_labels(tmp_path / "images/a", "a1", "a2")
    photos_with_labels(tmp_path / "images/b/deep", "b1")
    write(tmp_path / "a.txt", "images/a/a1.png\nimages/a/a2.png\n")
    write(tmp_path / "data.yaml", f"names: [dog, cat]\n{entries}")
    load(tmp_path)
    assert f"photos in no split left out: 1 ({tmp_path}/images/b/deep/b1.png)" in capsys.readouterr().err


def test_cyclic_links_are_followed_once(tmp_path):
    folder = yolo_set(tmp_path) / "images/train"
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    photos_with_labels(tmp_path / "elsewhere/images", "linked")
    (folder / "linked").symlink_to(tmp_path / "elsewhere/images", target_is_directory=True)
    assert names(load(tmp_path), "train") == ["a.png", "b.png", "linked.png"]


def test_special_files_are_not_opened(tmp_path):
    yolo_set(tmp_path)
    for path in ("images/train/z.png", "labels/train/a.TXT", "labels/train/z.txt"):
        os.mkfifo(tmp_path / path)
    assert counts(load(tmp_path)) == [2, 1, 1]


def test_folders_with_the_names_of_splits(tmp_path, capsys):
    for split, stem in (("train2017", "a"), ("valid_images", "b"), ("Testing", "c")):
        photos_with_labels(tmp_path / "images" / split, stem)
    write_photo(tmp_path / "images/forgotten.png")
    write(tmp_path / "data.yaml", "names: [dog, cat]\n")
    assert counts(load(tmp_path)) == [1, 1, 1]
    assert f"photos in no split left out: 1 ({tmp_path}/images/forgotten.png)" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["labelImg", "labelImg splits", "CVAT", "Darknet"])
def test_label_files_next_to_the_photos(tmp_path, layout):
    if layout == "labelImg":
        photos_with_labels(tmp_path, "a", "b", "c")
        write(tmp_path / "classes.txt", "dog\ncat\n")
    elif layout == "labelImg splits":
        photos_with_labels(tmp_path / "train", "a", "b")
        photos_with_labels(tmp_path / "val", "c")
        write(tmp_path / "classes.txt", "dog\ncat\n")
    else:
        photos_with_labels(tmp_path / "obj_train_data", "a", "b", "c")
        prefix = "data/" if layout == "CVAT" else "/home/me/darknet/"
        write(tmp_path / "train.txt", "".join(f"{prefix}obj_train_data/{stem}.png\n" for stem in "abc"))
        write(tmp_path / "obj.names", "dog\ncat\n")
        write(tmp_path / "obj.data", "classes = 2\n")
    dataset = load(tmp_path)
    assert dataset.classes == ("dog", "cat")
    assert counts(dataset) == [2, 1, 0]
    assert all(len(sample.labels) == 2 for samples in dataset.splits.values() for sample in samples)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[null, 1e3, 007]", ("null", "1e3", "007")),
        ("[yes, no, on]", ("yes", "no", "on")),
        ("{0: 1.0, 1: 0x1f, 2: 2026-11-26}", ("1.0", "0x1f", "2026-11-26")),
        ("[0, 1, 2]", ("0", "1", "2")),
        ("['1e3', \"no\", cat]", ("1e3", "no", "cat")),
    ],
)
def test_class_names_are_not_converted(tmp_path, capsys, text, expected):
    write(yolo_set(tmp_path) / "data.yaml", f"names: {text}\n")
    assert load(tmp_path).classes == expected
    is_plain = "cat" in expected or expected == ("0", "1", "2")
    assert ("class names that YAML reads as other values" in capsys.readouterr().err) != is_plain


@pytest.mark.parametrize("text", ["[dog, ~]", "[dog, '']", "{0: dog, 1: }"])
def test_a_class_without_a_name_is_rejected(tmp_path, text):
    write(yolo_set(tmp_path) / "data.yaml", f"names: {text}\n")
    with pytest.raises(DataError, match=r"data.yaml:1:\d+: a class without a name"):
        load(tmp_path)


def test_more_classes_than_a_configuration_may_list(tmp_path):
    write(yolo_set(tmp_path) / "data.yaml", "names:\n" + "".join(f"  {k}: class {k}\n" for k in range(1203)))
    assert len(load(tmp_path).classes) == 1203


# Unusual annotations: the others are still read


YOLO_LINES = {  # a line -> label and box in fractions (None: no box), the warning
    "0.0 .5 .5 .5 .5": ((0, (0.25, 0.25, 0.75, 0.75)), "class numbers such as 0.0 read as whole numbers"),
    "cat .5 .5 .5 .5": ((1, (0.25, 0.25, 0.75, 0.75)), "classes given by name"),
    "1 .1 .1 .9 .1 .5 .8": ((1, (0.1, 0.1, 0.9, 0.8)), "outlines read as the boxes around them"),
    "1 .1 .1 .9 .1 .9 .8 .1 .8": ((1, (0.1, 0.1, 0.9, 0.8)), "outlines read as the boxes around them"),
    "0 .5 .5 .5 .5 .99": ((0, (0.25, 0.25, 0.75, 0.75)), None),
    "0 1.5 .5 .5 .5": (None, "boxes outside their photo left out"),
    "0 .5 .5 0 .5": (None, "boxes without area left out"),
    "0 .5 .5 wide .5": (None, "lines that are not `class x y w h` left out"),
    "0 .5 .5 .5": (None, "lines that are not `class x y w h` left out"),
    "0 .1 .1 .9 .1 .5 .8 .3": (None, "lines that are not `class x y w h` left out"),
    "0 nan .5 .5 .5": (None, "lines that are not `class x y w h` left out"),
    "0 .5 .5 1e400 .5": (None, "lines that are not `class x y w h` left out"),
}


@pytest.mark.parametrize("line", YOLO_LINES)
def test_unusual_lines_of_yolo(tmp_path, capsys, line):
    expected, warning = YOLO_LINES[line]
    write(yolo_set(tmp_path) / "labels/train/a.txt", f"1 .2 .2 .1 .1\n{line}\n")
    sample = find_sample(load(tmp_path), "a")
    err = capsys.readouterr().err
    assert len(sample.labels) == (2 if expected else 1)
    if expected:
        assert sample.labels[1] == expected[0]
        torch.testing.assert_close(sample.boxes_xyxy[1], torch.tensor(expected[1]) * torch.tensor([60, 40, 60, 40.0]))
    assert warning is None or f"{warning}: 1 ({tmp_path}/labels/train/a.txt:2)" in err


def test_keypoints_after_the_box_are_ignored(tmp_path):
    yolo_set(tmp_path)
    write(tmp_path / "data.yaml", "names: [dog, cat]\nkpt_shape: [2, 3]\n")
    write(tmp_path / "labels/train/a.txt", "1 .5 .5 .5 .5 .1 .1 2 .9 .9 2\n")
    torch.testing.assert_close(find_sample(load(tmp_path), "a").boxes_xyxy, torch.tensor([[15.0, 10, 45, 30]]))


VOC_OBJECTS = {  # an object -> whether it is difficult (None: left out), the warning
    xml_object(extra="<difficult>True</difficult>"): (True, None),
    xml_object(extra="<difficult>1.0</difficult>"): (True, None),
    xml_object(extra="<difficult>False</difficult>"): (False, None),
    xml_object(extra="<difficult/>"): (False, None),
    xml_object(extra="<difficult>Unspecified</difficult>"): (False, "flags `difficult` that are neither 0 nor 1"),
    xml_object(edges=("5.5", "6.0", "2e1", " 30 ")): (False, None),
    xml_object(edges=(70, 6, 80, 30)): (None, "boxes outside their photo left out"),
    xml_object(edges=(5, 6, "nine", 30)): (None, "objects whose box lacks a number left out"),
    xml_object(edges=(5, 6, "nan", 30)): (None, "objects whose box lacks a number left out"),
    xml_object(edges=(5, 6, "9" * 400, 30)): (None, "objects whose box lacks a number left out"),
    xml_object().replace("<ymin>6</ymin>", ""): (None, "objects whose box lacks a number left out"),
    xml_object(name=" "): (None, "objects without a name left out"),
    xml_object().replace("bndbox", "polygon"): (None, "objects without a bndbox left out"),
}


@pytest.mark.parametrize("text", VOC_OBJECTS)
def test_unusual_objects_of_voc(tmp_path, capsys, text):
    difficult, warning = VOC_OBJECTS[text]
    write(voc_set(tmp_path) / "Annotations/a.xml", xml(xml_object(edges=(1, 1, 9, 9)), text))
    sample = find_sample(load(tmp_path), "a")
    err = capsys.readouterr().err
    assert sample.difficult.tolist() == ([False] if difficult is None else [False, difficult])
    assert warning is None or (warning in err and f": 1 ({tmp_path}/Annotations/a.xml:3)" in err)


COCO_CHANGES = {  # a change of annotation 0 -> the number of boxes that remain of three, the warning
    "a bbox of three numbers": ({"bbox": [1, 2, 3]}, 2, "without a bbox of four numbers left out"),
    "a huge number": ({"bbox": [1, 2, 10**400, 3]}, 2, "without a bbox of four numbers left out"),
    "a bbox of null": ({"bbox": None}, 2, "without a bbox of four numbers left out"),
    "a bbox of objects": ({"bbox": [{}, [], 1, 2]}, 2, "without a bbox of four numbers left out"),
    "a bbox of booleans": ({"bbox": [1, 2, True, 4]}, 2, "without a bbox of four numbers left out"),
    "a bbox of text": ({"bbox": ["1", "2", "3", "4"]}, 3, None),
    "an outline": ({"bbox": [], "segmentation": [[1, 2, 9, 2, 9, 8]]}, 3, "box taken from the outline"),
    "a box outside": ({"bbox": [70, 2, 3, 4]}, 2, "boxes outside their photo left out"),
    "an unknown image": ({"image_id": 99}, 2, "annotations of an image that the file does not list left out"),
    "an image that is a list": ({"image_id": [1]}, 2, "annotations of an image that the file does not list left out"),
    "an image that is an object": ({"image_id": {"a": 1}}, 2, "annotations of an image that the file does not list"),
    "no image": ({"image_id": None}, 2, "annotations of an image that the file does not list left out"),
    "ids as text": ({"image_id": "1", "category_id": "2"}, 3, None),
    "ids as fractions": ({"image_id": 1.0, "category_id": 2.0}, 3, None),
    "a crowd as text": ({"iscrowd": "1"}, 3, None),
    "a crowd as true": ({"iscrowd": True}, 3, None),
    "a crowd of null": ({"iscrowd": None}, 3, None),
    "a crowd of words": ({"iscrowd": "many"}, 3, "flags `iscrowd` that are neither 0 nor 1 read as 0"),
}


@pytest.mark.parametrize("name", COCO_CHANGES)
def test_unusual_annotations_of_coco(tmp_path, capsys, name):
    change, count, warning = COCO_CHANGES[name]
    path = coco_set(tmp_path) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0] |= change
    path.write_text(json.dumps(content))
    sample = find_sample(load(tmp_path), "a")
    err = capsys.readouterr().err
    assert len(sample.labels) == count
    assert (sample.crowd is not None) == (change.get("iscrowd") in ("1", True))
    assert warning is None or (warning in err and ": annotations[0])" in err)


def test_annotations_that_are_not_objects(tmp_path):
    path = coco_set(tmp_path) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] += [None, [], 7, "x"]
    path.write_text(json.dumps(content))
    assert len(find_sample(load(tmp_path), "a").labels) == 3


@pytest.mark.parametrize("form", ["voc", "yolo", "coco"])
def test_repeated_boxes_are_read_once(tmp_path, capsys, form):
    if form == "voc":
        objects = [xml_object(), xml_object(), xml_object("dog"), xml_object(edges=("5.001", 6, 20, 30))]
        write(voc_set(tmp_path) / "Annotations/a.xml", xml(*objects))
    elif form == "yolo":
        lines = ["0 .5 .5 .5 .5", "0 .5 .5 .5 .5", "1 .5 .5 .5 .5", "0 .5000001 .5 .5 .5"]
        write(yolo_set(tmp_path) / "labels/train/a.txt", "\n".join(lines))
    else:
        path = coco_set(tmp_path) / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        first = {"image_id": 1, "category_id": 1, "bbox": [5, 6, 20, 30], "iscrowd": 0}
        content["annotations"] = [first, first, first | {"category_id": 2}, first | {"bbox": [5, 6.001, 20, 30]}]
        path.write_text(json.dumps(content))
    assert len(find_sample(load(tmp_path), "a").labels) == 2
    assert "repeated boxes read once: 2 (" in capsys.readouterr().err


def test_a_repeated_box_is_difficult_only_if_all_of_them_are(tmp_path):
    objects = [xml_object(extra="<difficult>1</difficult>"), xml_object()]
    write(voc_set(tmp_path) / "Annotations/a.xml", xml(*objects))
    assert find_sample(load(tmp_path), "a").difficult.tolist() == [False]


# Classes


@pytest.mark.parametrize(
    ("written", "classes"),
    [
        (["cat", " cat ", "cat\n"], ("cat",)),
        (["Dog", "dog", "dog"], ("dog",)),
        (["DOG", "DOG", "dog"], ("DOG",)),
        (["traffic  light", "traffic light"], ("traffic light",)),
        (["caf\u00e9", "cafe\u0301"], ("caf\u00e9",)),
        (["a", "A"], ("A", "a")),
        (["cat", "dog"], ("cat", "dog")),
    ],
)
@pytest.mark.parametrize("form", ["voc", "coco"])
def test_names_that_differ_in_case_or_spaces_are_one_class(tmp_path, capsys, form, written, classes):
    boxes = [(5 + 3 * k, 6, 20 + 3 * k, 30) for k in range(len(written))]
    if form == "voc":
        objects = [xml_object(name, edges) for name, edges in zip(written, boxes, strict=True)]
        voc_set(tmp_path, lists=False)
        for name in "abc":
            write(tmp_path / f"Annotations/{name}.xml", xml(*objects))
    else:
        path = coco_set(tmp_path) / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": k, "name": name} for k, name in enumerate(written)]
        content["annotations"] = [
            {"image_id": 1, "category_id": k, "bbox": [*box[:2], 9, 9]} for k, box in enumerate(boxes)
        ]
        path.write_text(json.dumps(content))
    dataset = load(tmp_path)
    assert sorted(dataset.classes) == sorted(classes)
    sample = find_sample(dataset, "a")
    assert len(sample.labels) == len(written)
    assert len(set(sample.labels.tolist())) == len(classes)
    merged = [name for name in written if (name.strip() if form == "voc" else name) not in classes]
    assert ("counted as" in capsys.readouterr().err) == bool(merged)


@pytest.mark.parametrize("files", [1, 3])
def test_the_root_category_of_roboflow_is_not_a_class(tmp_path, capsys, files):
    for split in ("train", "valid", "test")[:files]:
        path = coco_set(tmp_path / split, "_annotations.coco.json", "") / "_annotations.coco.json"
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["supercategory"] = "pets"
        content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
        path.write_text(json.dumps(content))
    dataset = load(tmp_path)
    assert dataset.classes == ("dog", "cat")
    assert "category 'pets' without a box, the supercategory of the others, is no class" in capsys.readouterr().err
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    assert load(tmp_path).classes == ("pets", "dog", "cat")


# Photos and files


@pytest.mark.parametrize("form", ["voc", "voc lists", "yolo", "coco"])
def test_a_missing_photo_is_left_out_and_the_others_are_read(tmp_path, capsys, form):
    if form == "coco":
        (coco_set(tmp_path) / "train2017/b.jpg").unlink()
    elif form == "yolo":
        (yolo_set(tmp_path) / "images/train/a.png").unlink()
    else:
        (voc_set(tmp_path, lists=form == "voc lists") / "JPEGImages/b.jpg").unlink()
    dataset = load(tmp_path, val_fraction=0.0)
    missing = "a" if form == "yolo" else "b"
    assert missing not in {sample.path.stem for samples in dataset.splits.values() for sample in samples}
    err = capsys.readouterr().err
    assert "left out: 1 (" in err
    assert "photo" in err


def test_photos_without_an_annotation_are_reported(tmp_path, capsys):
    voc_set(tmp_path, lists=False)
    for name in ("x", "y"):
        write_photo(tmp_path / f"JPEGImages/{name}.jpg")
    assert counts(load(tmp_path, val_fraction=0.0)) == [3, 0, 0]
    paths = f"{tmp_path}/JPEGImages/x.jpg, {tmp_path}/JPEGImages/y.jpg"
    assert f"photos without an annotation left out: 2 ({paths})" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_photos_with_the_same_name_are_distinguished_or_reported(tmp_path, capsys, form):
    folder = (voc_set(tmp_path) / "JPEGImages") if form == "voc" else (yolo_set(tmp_path) / "images/train")
    write_photo(folder / ("a.png" if form == "voc" else "a.jpg"))
    dataset = load(tmp_path, val_fraction=0.0)
    assert find_sample(dataset, "a").path.suffix == ".jpg"
    assert f"photos beside another one of the same name left out: 1 ({folder}/a.png)" in capsys.readouterr().err


def test_the_file_name_in_an_annotation_selects_the_photo(tmp_path):
    voc_set(tmp_path, lists=False)
    write_photo(tmp_path / "JPEGImages/a.png")
    write(tmp_path / "Annotations/a.xml", xml(xml_object(), before="<filename>a.png</filename>"))
    write(tmp_path / "Annotations/0001.xml", xml(xml_object(), before="<filename>C:\\x\\b.jpg</filename>"))
    (tmp_path / "Annotations/b.xml").unlink()
    dataset = load(tmp_path)
    assert find_sample(dataset, "a").path.suffix == ".png"
    assert len(find_sample(dataset, "b").labels) == 1


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_photo_in_two_splits_is_reported(tmp_path, capsys, is_copy):
    folder = voc_set(tmp_path, names="abcd")
    if is_copy:
        shutil.copy(folder / "JPEGImages/a.jpg", folder / "JPEGImages/d.jpg")
    else:
        write(folder / "ImageSets/Main/val.txt", "a\n")
    load(tmp_path, val_fraction=0.0)
    name, split = ("d", "test") if is_copy else ("a", "val")
    path = f"{tmp_path}/JPEGImages/{name}.jpg"
    assert f"photos of {split} that are in train too: 1 ({path})" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a.jpg\nb.jpg\n", "a  1\nb -1\n", "JPEGImages/a.jpg\nb\n", "a\na\nb\n", "./a\nb\n"])
def test_lines_of_imagesets(tmp_path, capsys, text):
    write(voc_set(tmp_path) / "ImageSets/Main/train.txt", text)
    assert names(load(tmp_path, val_fraction=0.0), "train") == ["a.jpg", "b.jpg"]
    assert "train.txt:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"trainval": "a b c"}, [3, 0, 0]),
        ({"default": "a b c"}, [3, 0, 0]),
        ({"trainval": "a b c", "val": "c"}, [2, 1, 0]),
        ({"trainval": "a b", "test": "c"}, [2, 0, 1]),
        ({"train": "a", "valid": "b", "test": "c"}, [1, 1, 1]),
        ({"Train": "a b", "Validation": "c", "cat_train": "a"}, [2, 1, 0]),
        ({"train": "a b"}, [2, 0, 0]),
    ],
)
def test_lists_of_imagesets(tmp_path, capsys, lists, expected):
    voc_set(tmp_path, lists=False)
    for name, stems in lists.items():
        write(tmp_path / f"ImageSets/Main/{name}.txt", stems.replace(" ", "\n"))
    assert counts(load(tmp_path, val_fraction=0.0)) == expected
    assert ("photos that no list of ImageSets names left out" in capsys.readouterr().err) == (sum(expected) < 3)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [("annots", "images"), ("Annots", "Images"), ("xml", "imgs"), ("annotations", "photos"), ("labels", "images")],
)
@pytest.mark.parametrize("ending", [".xml", ".XML"])
def test_other_names_of_voc_folders(tmp_path, annotations, images, ending):
    voc_set(tmp_path / "set", lists=False)
    (tmp_path / "set/Annotations").rename(tmp_path / "set" / annotations)
    (tmp_path / "set/JPEGImages").rename(tmp_path / "set" / images)
    for path in list((tmp_path / "set" / annotations).iterdir()):
        path.rename(path.with_suffix(ending))
    assert counts(load(tmp_path / "set")) == [2, 1, 0]


def test_voc_in_subfolders_with_the_names_of_splits(tmp_path):
    voc_set(tmp_path, lists=False)
    for name, split in (("a", "train"), ("b", "train"), ("c", "val")):
        for kind, ending in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            (tmp_path / kind / split).mkdir(exist_ok=True)
            (tmp_path / kind / f"{name}{ending}").rename(tmp_path / kind / split / f"{name}{ending}")
    assert counts(load(tmp_path)) == [2, 1, 0]


@pytest.mark.parametrize("make", [voc_set, yolo_set, coco_set])
def test_hidden_files_of_macos_are_ignored(tmp_path, make):
    expected = counts(load(make(tmp_path / "plain")))
    folder = make(tmp_path / "mac")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7 not yours")
        (path.parent / ".DS_Store").write_bytes(b"\0")
    shutil.copytree(folder, folder / "__MACOSX", ignore=lambda _, names: [n for n in names if not n.startswith("._")])
    assert counts(load(folder)) == expected


@pytest.mark.parametrize("make", [voc_set, yolo_set, coco_set])
@pytest.mark.parametrize("name", ["br[2024]", "a*b", "what?", "{x}", "\u00fcn\u00efcode", "with space"])
def test_folders_with_unusual_names(tmp_path, make, name):
    assert sum(counts(load(make(tmp_path / name)))) > 1
    folder = tmp_path / name / "pictures"
    for stem in "xy":
        write_photo(folder / f"{stem}.jpg")
    write_photo(folder / "[z].jpg")
    assert len(photo_paths.find_images([str(folder / "*.jpg")])) == 3
    assert len(photo_paths.find_images([str(tmp_path / name / "**/[xy].jpg")])) == 2
    assert photo_paths.find_images([str(folder / "[z].jpg")]) == [folder / "[z].jpg"]
    assert len(photo_paths.find_images([str(folder)])) == 3
    with pytest.raises(DataError, match="matches no file"):
        photo_paths.find_images([str(folder / "*.png")])


@pytest.mark.parametrize("name", ["images\\a.jpg", "./images/a.jpg", "images/a.jpg", "D:\\set\\a.jpg", " a.jpg"])
def test_names_of_photos_in_coco(tmp_path, name):
    path = coco_set(tmp_path, "all.json", "images") / "all.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = name
    path.rename(tmp_path / "ALL.JSON").write_text(json.dumps(content))
    assert len(find_sample(load(tmp_path), "a").labels) == 3


def test_two_records_of_one_photo_are_merged(tmp_path, capsys):
    path = coco_set(tmp_path, "all.json", "") / "all.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"id": 7})
    content["annotations"][2]["image_id"] = 7
    path.write_text(json.dumps(content))
    dataset = load(tmp_path, val_fraction=0.0)
    assert counts(dataset) == [2, 0, 0]
    assert torch.equal(find_sample(dataset, "a").boxes_xyxy, BOXES)
    assert "photos with several annotations" in capsys.readouterr().err


def test_a_photo_that_cannot_be_read_is_left_out(tmp_path, capsys):
    write(voc_set(tmp_path) / "JPEGImages/a.jpg", "no photo")
    assert names(load(tmp_path, val_fraction=0.0), "train") == ["b.jpg"]
    assert (
        f"photos that cannot be read left out: 1 ({tmp_path}/JPEGImages/a.jpg: not a photo" in capsys.readouterr().err
    )


def test_a_data_set_without_irregularities_logs_nothing(tmp_path, capsys):
    for make in (voc_set, coco_set):
        load(make(tmp_path / make.__name__), val_fraction=0.0)
    yolo_set(tmp_path / "yolo")
    (tmp_path / "yolo/images/train/b.png").unlink()
    load(tmp_path / "yolo")
    assert capsys.readouterr().err == ""
