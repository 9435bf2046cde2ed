"""COCO's layout: a JSON file with `images`, `annotations` and `categories`, or a folder with one for each split.

Source: Lin et al., 2014, "Microsoft COCO", cocodataset.org/#format-data; a box is x, y, width, height in pixels from 0.
A crowd (`iscrowd`) is kept as difficult: it is neither to be found nor a false alarm.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from cvlab.errors import DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import Annotated, Layout, Marked

MAX_JSON_BYTES = 600_000_000  # COCO's own train2017 has 470 MB
CORRECT = "correct the file, or get it again"


def fits(path: Path) -> bool:
    """Whether a path is a JSON file, or a folder with some in it, in `annotations` or in a folder for each split."""
    return path.suffix.lower() == ".json" if path.is_file() else bool(_files(path))


def _files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that hold boxes: the `instances_` ones where there are such."""
    for place in (folder / "annotations", folder / "Annotations"):
        if found := sorted(place.glob("*.json")):
            return [path for path in found if path.name.startswith("instances")] or found
    of_splits = [path for path in sorted(folder.glob("*/*.json")) if annotations.split_of(path.parent.name)]
    return of_splits or sorted(folder.glob("*.json"))


def read_path(path: Path) -> Layout:
    """Read a JSON file as `train`, or all files of a folder, each the split that its name or its folder's says."""
    files = [path] if path.is_file() else _files(path)
    named = {file: "train" if len(files) == 1 else _split(file) for file in files}
    by_split: dict[str, Path] = {}
    for file, split in named.items():
        if split is None or split in by_split:
            what = f"{by_split[split].name} is {split} too" if split else "no split (train, val, test) in its name"
            raise DataError(f"{file}: {what}", "name one JSON file, or leave one for each split")
        by_split[split] = file
    classes: dict[str, None] = {}
    splits = {}
    for split, file in sorted(by_split.items(), key=lambda item: annotations.SPLITS.index(item[0])):
        splits[split], names = read(file)
        classes |= dict.fromkeys(names)
    return Layout("COCO", splits, tuple(classes))


def _split(file: Path) -> str | None:
    """Return the split that a file is for: `instances_val2017.json`, `val.json`, `valid/_annotations.coco.json`."""
    words = [word for word in re.split(r"[^a-z]+", file.stem.lower()) if word]
    found = {split for word in (*words, file.parent.name) if (split := annotations.split_of(word))}
    return found.pop() if len(found) == 1 else None


def read(path: Path) -> tuple[list[Annotated], list[str]]:
    """Return the photos that a file names, with their boxes, and its categories in the order of their ids."""
    content = _parse(path)
    categories = _by_id(path, content, "categories")
    images = _by_id(path, content, "images")
    names = {key: _text(path, f"category {key}", about, "name") for key, about in categories.items()}
    objects: dict[Any, list[Marked]] = {key: [] for key in images}
    for k, about in enumerate(_list(path, content, "annotations")):
        place = f"{path}: annotations[{k}]"
        if not isinstance(about, dict) or about.get("image_id") not in images:
            raise DataError(f"{place}: image_id is that of no image", CORRECT)
        if about.get("category_id") not in names:
            raise DataError(f"{place}: category_id {str(about.get('category_id'))[:40]} is in no category", CORRECT)
        marked = Marked(place, names[about["category_id"]], _box(place, about.get("bbox")), about.get("iscrowd") == 1)
        objects[about["image_id"]].append(marked)
    folder = _Photos(path)
    found = []
    for key, about in images.items():
        file = folder.find(_text(path, f"image {key}", about, "file_name"))
        found.append(Annotated(file, path, tuple(objects[key]), _size(about)))
    return found, [names[key] for key in sorted(names)]


def _parse(path: Path) -> dict[str, Any]:
    raw = annotations.read_bytes(path, MAX_JSON_BYTES)

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a number")

    try:
        content = json.loads(raw, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}", CORRECT) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}", CORRECT) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not COCO's JSON: its top is no object", CORRECT)
    return content


def _list(path: Path, content: dict[str, Any], key: str) -> list[Any]:
    found = content.get(key)
    if not isinstance(found, list):
        raise DataError(f"{path}: has no list of {key}", "COCO's JSON has images, annotations and categories")
    return found


def _by_id(path: Path, content: dict[str, Any], key: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for k, about in enumerate(_list(path, content, key)):
        number = about.get("id") if isinstance(about, dict) else None
        if type(number) is not int or number in found:
            raise DataError(f"{path}: {key}[{k}]: id is no whole number of its own: {str(number)[:40]}", CORRECT)
        found[number] = about
    return found


def _text(path: Path, place: str, about: dict[str, Any], key: str) -> str:
    found = about.get(key)
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{path}: {place} has no {key}", CORRECT)
    return found


def _box(place: str, value: Any) -> annotations.Box:
    if not isinstance(value, list) or len(value) != 4:
        raise DataError(f"{place}: bbox is not a list of four numbers", CORRECT)
    for k, number in enumerate(value):
        if type(number) not in (int, float) or not math.isfinite(number):
            raise DataError(f"{place}: bbox[{k}] is {str(number)[:40]!r}, not a number", CORRECT)
    x, y, width, height = map(float, value)
    return (x, y, x + width, y + height)


def _size(about: dict[str, Any]) -> tuple[int, int] | None:
    width, height = about.get("width"), about.get("height")
    return (width, height) if type(width) is int and type(height) is int and width > 0 and height > 0 else None


class _Photos:
    """Where the photos of a JSON file are: beside it, in `images`, or in a folder that is called as its split."""

    def __init__(self, path: Path) -> None:
        self.path = path
        top = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        year = path.stem.rpartition("_")[2]  # instances_val2017.json goes with val2017/
        split = _split(path) or ""
        below = ("", "images", year, f"images/{year}", split, f"images/{split}", "JPEGImages")
        self.folders = [top / name for name in dict.fromkeys(below)]

    def find(self, name: str) -> Path:
        """Return the file of a photo; DataError where it is in none of the folders. The last one is tried first."""
        for k, folder in enumerate(self.folders):
            if os.path.isfile(folder / name):  # False also for a name longer than the disk allows
                self.folders.insert(0, self.folders.pop(k))
                return folder / name
        ctx = ", ".join(str(folder) for folder in self.folders[:3])
        raise DataError(f"{self.path}: the photo {name[:200]!r} is not there", f"looked in {ctx} and others")
