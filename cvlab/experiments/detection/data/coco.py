"""Read boxes in COCO's format: a JSON file, or a folder with one for each split.

References: Lin et al., 2014, "Microsoft COCO", cocodataset.org/#format-data. A box is x, y, width and height in pixels
from 0. A crowd (`iscrowd`) is read as difficult: it is ignored in evaluation. The JSON itself is parsed in
cvlab/data/coco.py, which captions share.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

from cvlab.data import coco
from cvlab.data.coco import HINT, Record
from cvlab.errors import DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import AnnotationSet, Box, ImageAnnotation, ObjectAnnotation


def matches(path: Path) -> bool:
    """Whether a path is a JSON file, or a folder with some in it, in `annotations` or in a folder for each split."""
    return path.suffix.lower() == ".json" if path.is_file() else bool(_find_files(path))


def _find_files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that hold boxes: the `instances_` ones if there are any."""
    for subfolder in (folder / "annotations", folder / "Annotations"):
        if files := sorted(subfolder.glob("*.json")):
            return [path for path in files if path.name.startswith("instances")] or files
    of_splits = [path for path in sorted(folder.glob("*/*.json")) if annotations.split_named(path.parent.name)]
    return of_splits or sorted(folder.glob("*.json"))


def read_path(path: Path) -> AnnotationSet:
    """Read a JSON file as `train`, or all files of a folder, each as the split that its or its folder's name says."""
    files = [path] if path.is_file() else _find_files(path)
    split_of_file = {file: "train" if len(files) == 1 else _split_of(file) for file in files}
    by_split: dict[str, Path] = {}
    for file, split in split_of_file.items():
        if split is None or split in by_split:
            problem = f"{by_split[split].name} is {split} too" if split else "no split (train, val, test) in its name"
            raise DataError(f"{file}: {problem}", "name one JSON file, or leave one for each split")
        by_split[split] = file
    classes: dict[str, None] = {}
    splits = {}
    for split, file in sorted(by_split.items(), key=lambda item: annotations.SPLITS.index(item[0])):
        splits[split], categories = read(file)
        classes |= dict.fromkeys(categories)
    return AnnotationSet("COCO", splits, tuple(classes))


def _split_of(file: Path) -> str | None:
    """Return the split of a file: `instances_val2017.json`, `val.json`, `valid/_annotations.coco.json`."""
    tokens = [token for token in re.split(r"[^a-z]+", file.stem.lower()) if token]
    splits = {split for token in (*tokens, file.parent.name) if (split := annotations.split_named(token))}
    return splits.pop() if len(splits) == 1 else None


def read(path: Path) -> tuple[list[ImageAnnotation], list[str]]:
    """Return a file's images with their boxes, and its category names in the order of their ids."""
    file = coco.read(path)
    categories = file.by_id("categories")
    images = file.by_id("images")
    names = {key: file.text(f"category {key}", record, "name") for key, record in categories.items()}
    objects: dict[int, list[ObjectAnnotation]] = {key: [] for key in images}
    for location, record in file.annotations(images):
        category: Any = record.get("category_id")
        if not coco.is_key(category, names):
            raise DataError(f"{location}: category_id {str(category)[:40]} is in no category", HINT)
        box_xyxy = _parse_box(location, record.get("bbox"))
        is_crowd = record.get("iscrowd") == 1
        objects[record["image_id"]].append(ObjectAnnotation(location, names[category], box_xyxy, is_crowd, is_crowd))
    finder = _ImageFinder(path)
    annotated = []
    for key, record in images.items():
        image = finder.find(file.text(f"image {key}", record, "file_name"))
        annotated.append(ImageAnnotation(image, path, tuple(objects[key]), _parse_size(record)))
    return annotated, [names[key] for key in sorted(names)]


def _parse_box(location: str, value: Any) -> Box:
    """Return a `bbox` as x1, y1, x2, y2."""
    if not isinstance(value, list) or len(value) != 4:
        raise DataError(f"{location}: bbox is not a list of four numbers", HINT)
    for k, number in enumerate(value):
        if type(number) not in (int, float) or not math.isfinite(number):
            raise DataError(f"{location}: bbox[{k}] is {str(number)[:40]!r}, not a number", HINT)
    x, y, width, height = map(float, value)
    return (x, y, x + width, y + height)


def _parse_size(record: Record) -> tuple[int, int] | None:
    """Return an image record's width and height if it has both."""
    width, height = record.get("width"), record.get("height")
    return (width, height) if type(width) is int and type(height) is int and width > 0 and height > 0 else None


class _ImageFinder:
    """Finds the images of a JSON file: beside it, in `images`, or in a folder named like its split."""

    def __init__(self, path: Path) -> None:
        self.path = path
        root = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        year = path.stem.rpartition("_")[2]  # instances_val2017.json belongs to val2017/
        split = _split_of(path) or ""
        subfolders = ("", "images", year, f"images/{year}", split, f"images/{split}", "JPEGImages")
        self.folders = [root / name for name in dict.fromkeys(subfolders)]

    def find(self, name: str) -> Path:
        """Return the file of an image; DataError if it is in none of the folders. The last one is tried first."""
        for k, folder in enumerate(self.folders):
            if os.path.isfile(folder / name):  # False also for a name longer than the disk allows
                self.folders.insert(0, self.folders.pop(k))
                return folder / name
        searched = ", ".join(str(folder) for folder in self.folders[:3])
        raise DataError(f"{self.path}: the photo {name[:200]!r} is not there", f"looked in {searched} and others")
