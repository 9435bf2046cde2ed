"""Read boxes in COCO's format: a JSON file, or a folder with one for each split.

References: Lin et al., 2014, "Microsoft COCO", cocodataset.org/#format-data. A box is x, y, width and height in pixels
from 0. A crowd (`iscrowd`) is read as difficult: it is ignored in evaluation. The JSON itself is parsed in
cvlab/data/coco.py, which captions share.
"""

import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cvlab.data import coco, files
from cvlab.data.coco import HINT, Id, Record
from cvlab.errors import DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import (
    AnnotationSet,
    Box,
    ImageAnnotation,
    Irregularities,
    ObjectAnnotation,
)

MIN_OUTLINE_NUMBERS = 6  # three points


def matches(path: Path) -> bool:
    """Whether a path is a JSON file, or a folder with some in it, in `annotations` or in a folder for each split."""
    return path.suffix.lower() == ".json" if path.is_file() else bool(_find_files(path))


def _find_files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that hold boxes: the `instances_` ones if there are any."""
    children = files.subfolders(folder)
    for subfolder in (child for child in children if child.name.lower() in ("annotations", "annotation")):
        if paths := files.list_files(subfolder, (".json",)):
            return [path for path in paths if path.name.lower().startswith("instances")] or paths
    of_splits = [child for child in children if annotations.split_named(child.name)]
    paths = [path for child in of_splits for path in files.list_files(child, (".json",))]
    return paths or files.list_files(folder, (".json",))


def read_path(path: Path) -> AnnotationSet:
    """Read a JSON file as `train`, or all files of a folder, each as the split that its or its folder's name says."""
    paths = [path] if path.is_file() else _find_files(path)
    split_of_file = {file: "train" if len(paths) == 1 else _split_of(file) for file in paths}
    by_split: dict[str, Path] = {}
    for file, split in split_of_file.items():
        if split is None or split in by_split:
            problem = f"{by_split[split].name} is {split} too" if split else "no split (train, val, test) in its name"
            raise DataError(f"{file}: {problem}", "name one JSON file, or leave one for each split")
        by_split[split] = file
    return read_splits(by_split, path)


def read_splits(by_split: Mapping[str, Path], path: Path) -> AnnotationSet:
    """Read the JSON file of each split; `path` is the file or folder that messages about all of them name."""
    irregularities = Irregularities()
    splits: dict[str, list[ImageAnnotation]] = {}
    categories: dict[str, set[str]] = {}  # name -> the names of its supercategories
    for split, file in sorted(by_split.items(), key=lambda item: annotations.SPLITS.index(item[0])):
        splits[split], parents = _read(file, irregularities)
        for name, parent in parents:
            categories.setdefault(name, set()).add(parent)
    used = {obj.name for images in splits.values() for image in images for obj in image.objects}
    roots = {name for name in categories if _is_root(name, categories, used)}
    for name in roots:
        irregularities.add(f"category {name!r} without a box, the supercategory of the others, is no class", path)
    return AnnotationSet("COCO", splits, tuple(name for name in categories if name not in roots), irregularities)


def _is_root(name: str, categories: dict[str, set[str]], used: set[str]) -> bool:
    """Whether a category is only the heading of the others, as Roboflow writes it, and no class."""
    has_parent = bool(categories[name] - {"", "none", name})
    return (
        name not in used and not has_parent and any(name in categories[other] for other in categories if other != name)
    )


def _split_of(file: Path) -> str | None:
    """Return the split of a file: `instances_val2017.json`, `val.json`, `valid/_annotations.coco.json`."""
    return annotations.split_named(file.stem) or annotations.split_named(file.parent.name)


def _read(path: Path, irregularities: Irregularities) -> tuple[list[ImageAnnotation], list[tuple[str, str]]]:
    """Return a file's images with their boxes, and its categories by id, each with its supercategory."""
    file = coco.read(path)
    categories = file.by_id("categories")
    images = file.by_id("images")
    names = {key: file.text(f"category {key}", record, "name") for key, record in categories.items()}
    for name in sorted({name for name in names.values() if list(names.values()).count(name) > 1}):
        irregularities.add(f"categories called {name!r} are one class", path)
    objects: dict[Id, list[ObjectAnnotation]] = {key: [] for key in images}
    for location, image, record in file.annotations(images):
        if image is None:
            irregularities.add("annotations of an image that the file does not list left out", location)
            continue
        obj = _parse_object(location, record, names, irregularities)
        if obj is not None:
            objects[image].append(obj)
    finder = _ImageFinder(path)
    annotated = []
    for key, record in images.items():
        photo = finder.find(file.text(f"image {key}", record, "file_name"))
        if photo is None:
            searched = f"photos that are not in {finder.folders[0]} and the folders beside it left out"
            irregularities.add(searched, f"{path}: image {key}: {record['file_name'][:200]!r}")
        else:
            annotated.append(ImageAnnotation(photo, path, tuple(objects[key]), _parse_size(record)))
    order = sorted(names, key=lambda key: (isinstance(key, str), key))
    return annotated, [(names[key], str(categories[key].get("supercategory") or "").strip()) for key in order]


def _parse_object(
    location: str, record: Record, names: dict[Id, str], irregularities: Irregularities
) -> ObjectAnnotation | None:
    """Return an annotation as an object; None if it has no box. DataError if it is of no category."""
    category = coco.parse_id(record.get("category_id"))
    if category not in names:
        raise DataError(f"{location}: category_id {str(record.get('category_id'))[:40]} is in no category", HINT)
    box_xyxy = _parse_box(record.get("bbox"))
    if box_xyxy is None:
        box_xyxy = _box_of_outline(record.get("segmentation"))
        kind = "annotations without a bbox of four numbers"
        irregularities.add(f"{kind}, box taken from the outline" if box_xyxy else f"{kind} left out", location)
    if box_xyxy is None:
        return None
    is_crowd = annotations.parse_flag(record.get("iscrowd"))
    if is_crowd is None:
        irregularities.add("flags `iscrowd` that are neither 0 nor 1 read as 0", location)
    return ObjectAnnotation(location, names[category], box_xyxy, bool(is_crowd), bool(is_crowd))


def _parse_box(value: Any) -> Box | None:
    """Return a `bbox` as x1, y1, x2, y2; None if it is not a list of four numbers."""
    numbers = [annotations.parse_number(number) for number in value] if isinstance(value, list) else []
    x, y, width, height = numbers if len(numbers) == 4 else [None] * 4
    if x is None or y is None or width is None or height is None:
        return None
    return (x, y, x + width, y + height)


def _box_of_outline(value: Any) -> Box | None:
    """Return the box around the polygons of a `segmentation`; None if it has none."""
    polygons = value if isinstance(value, list) else []
    numbers = [annotations.parse_number(n) for polygon in polygons if isinstance(polygon, list) for n in polygon]
    points = [number for number in numbers if number is not None]
    if len(points) < MIN_OUTLINE_NUMBERS or len(points) % 2 or len(points) != len(numbers):
        return None
    return (min(points[0::2]), min(points[1::2]), max(points[0::2]), max(points[1::2]))


def _parse_size(record: Record) -> tuple[int, int] | None:
    """Return an image record's width and height if it has both."""
    width, height = record.get("width"), record.get("height")
    return (width, height) if type(width) is int and type(height) is int and width > 0 and height > 0 else None


class _ImageFinder:
    """Finds the images of a JSON file: beside it, in `images`, or in a folder named like its split."""

    def __init__(self, path: Path) -> None:
        is_below = path.parent.name.lower() in ("annotations", "annotation")
        root = path.parent.parent if is_below else path.parent
        year = path.stem.rpartition("_")[2]  # instances_val2017.json belongs to val2017/
        split = _split_of(path) or ""
        subfolders = ["", "images", "Images"]
        for alias in (year, split, *annotations.SPLIT_ALIASES.get(split, ())):
            subfolders += [alias, f"images/{alias}"]
        self.folders = [root / name for name in dict.fromkeys([*subfolders, "JPEGImages", "data"])]
        self.root = root

    def find(self, name: str) -> Path | None:
        """Return the file of an image, None if it is in none of the folders. The last folder is tried first.

        The name is also tried with slashes for the backslashes of Windows, composed and decomposed, and alone.
        """
        plain = name.strip().replace("\\", "/")
        spelled = [plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))]
        for candidate in dict.fromkeys([name, *spelled, *(PurePosixPath(text).name for text in spelled)]):
            for k, folder in enumerate(self.folders):
                if candidate and os.path.isfile(folder / candidate):  # False also for a name that no disk has
                    self.folders.insert(0, self.folders.pop(k))
                    return folder / candidate
        return None
