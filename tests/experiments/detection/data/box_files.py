"""Small data sets with boxes in the formats of VOC, YOLO and COCO."""

import zlib
from pathlib import Path

import torch
from PIL import Image
from PIL.ExifTags import Base

from cvlab.experiments.detection.data import dataset, writers

SIZE = (60, 40)


BOXES = torch.tensor([[4.0, 5.0, 20.0, 30.0], [0.0, 0.0, 60.0, 40.0], [31.25, 7.5, 47.75, 12.0]])


def write_photo(path, size=SIZE, orientation=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[Base.Orientation] = orientation
    color = tuple(zlib.crc32(str(path).encode()).to_bytes(4, "big")[:3]) if mode == "RGB" else 0  # all photos differ
    Image.new(mode, size, color).save(path, **({"exif": exif} if orientation is not None else {}))
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def voc_set(folder, names=("a", "b", "c"), lists=True, ending=".jpg"):
    """Write a data set in VOC's layout; every photo has BOXES, and the last one is in the test list."""
    for name in names:
        write_photo(folder / "JPEGImages" / f"{name}{ending}")
        xml = writers.write_voc_xml(BOXES, ["cat", "dog", "cat"], SIZE, f"{name}{ending}", [False, True, False])
        write(folder / "Annotations" / f"{name}.xml", xml)
    if lists:
        write(folder / "ImageSets/Main/train.txt", "".join(f"{name}\n" for name in names[:-1]))
        write(folder / "ImageSets/Main/test.txt", f"{names[-1]}\n")
    return folder


def coco_set(folder, file="annotations/instances_train2017.json", images="train2017"):
    for name in ("a.jpg", "b.jpg"):
        write_photo(folder / images / name)
    boxed = writers.ImageBoxes("a.jpg", SIZE, BOXES, torch.tensor([1, 0, 1]))
    empty = writers.ImageBoxes("b.jpg", SIZE, BOXES[:0], torch.tensor([]))
    write(folder / file, writers.write_coco_json([boxed, empty], ["dog", "cat"]))
    return folder


def yolo_set(folder):
    for split, names in {"train": "ab", "val": "c", "test": "d"}.items():
        for name in names:
            write_photo(folder / "images" / split / f"{name}.png")
            text = writers.write_yolo_txt(BOXES, torch.tensor([1, 0, 1]), SIZE)
            write(folder / "labels" / split / f"{name}.txt", text)
    (folder / "labels/train/b.txt").unlink()
    write(folder / "data.yaml", "names:\n  0: dog\n  1: cat\n")
    return folder


def load(path, **options):
    return dataset.load("boxes", Path("nowhere"), str(path), **options)


def find_sample(loaded, stem):
    return next(item for items in loaded.splits.values() for item in items if item.path.stem == stem)


VOC_XML = """<annotation>
<object>
<name>cat</name>
<bndbox>
<xmin>5</xmin>
<ymin>5</ymin>
<xmax>9</xmax>
<ymax>9</ymax>
</bndbox></object></annotation>"""
