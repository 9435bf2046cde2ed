"""YOLO's layout: images/train, labels/train and so on; a line `class x y w h` for each object, in fractions.

Source: docs.ultralytics.com/datasets/detect: x and y are the centre, all is divided by the width or the height of the
photo. train/images and train/labels, and images and labels without splits, are taken too. Classes are those of
data.yaml (`names`) or classes.txt. A photo without a file of labels has no object.
"""

from pathlib import Path

from cvlab.config import strict_yaml
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import ALSO_CALLED, SPLITS, Annotated, Layout, Marked

LINE = "class x y w h"
CLASS_FILES = ("classes.txt", "labels/classes.txt", "obj.names")


def fits(folder: Path) -> bool:
    """Whether a folder has images and labels."""
    return bool(_pairs(folder))


def _pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of photos and of labels of each split."""
    found = {}
    for split in SPLITS:
        for word in ALSO_CALLED[split]:
            for images, labels in ((f"images/{word}", f"labels/{word}"), (f"{word}/images", f"{word}/labels")):
                if (folder / images).is_dir() and (folder / labels).is_dir():
                    found[split] = (folder / images, folder / labels)
    if not found and (folder / "images").is_dir() and (folder / "labels").is_dir():
        found["train"] = (folder / "images", folder / "labels")
    return found


def read_folder(folder: Path) -> Layout:
    """Read all photos of a folder."""
    classes = _classes(folder)
    splits = {split: _read_split(*pair, classes) for split, pair in _pairs(folder).items()}
    return Layout("YOLO", splits, classes)


def _classes(folder: Path) -> tuple[str, ...]:
    files = [folder / "data.yaml", folder / "data.yml", folder / "dataset.yaml"]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        return _names_of(file)
    lists = [folder / name for name in CLASS_FILES if (folder / name).is_file()]
    if not lists:
        raise DataError(f"{folder}: neither data.yaml nor classes.txt", "one of them names the classes")
    return tuple(line for _, line in annotations.read_lines(lists[0]))


def _names_of(file: Path) -> tuple[str, ...]:
    """Return `names` of a data.yaml: a list, or a mapping from numbers without gaps."""
    try:
        document = strict_yaml.read(file)
    except ConfigError as error:
        raise DataError(error.message, error.hint) from error
    names = document.value.get("names") if isinstance(document.value, dict) else None
    if isinstance(names, dict) and set(names) == {str(k) for k in range(len(names))}:
        names = tuple(names[str(k)] for k in range(len(names)))
    if not isinstance(names, tuple) or not names:
        place = document.place(("names",))
        raise DataError(f"{place}: names is no list of classes", "write `names: [cat, dog]`")
    return tuple(str(name) for name in names)


def _read_split(images: Path, labels: Path, classes: tuple[str, ...]) -> list[Annotated]:
    photos = annotations.photos_in(images)
    files = {path.stem: path for path in sorted(labels.glob("*.txt")) if path.name != "classes.txt"}
    for stem, path in files.items():
        if stem not in photos:
            raise DataError(f"{path}: {images} has no photo {stem}", "add the photo, or remove the labels")
    return [_annotated(photos[stem], files.get(stem), labels, classes) for stem in sorted(photos)]


def _annotated(image: Path, file: Path | None, labels: Path, classes: tuple[str, ...]) -> Annotated:
    lines = annotations.read_lines(file) if file is not None else []
    objects = tuple(_marked(line, f"{file}:{number}", classes) for number, line in lines)
    return Annotated(image, file or labels, objects, relative=True)


def _marked(line: str, place: str, classes: tuple[str, ...]) -> Marked:
    """Read one line; a sixth number is the score of a detection, and says nothing here."""
    words = line.split()
    if len(words) not in (5, 6):
        raise DataError(f"{place}: {len(words)} words where `{LINE}` is expected", "outlines and points are not boxes")
    if not words[0].isdecimal() or int(words[0][:9]) >= len(classes):
        raise DataError(f"{place}: class {words[0][:40]!r} is none of 0..{len(classes) - 1}", "correct it")
    x, y, w, h, *_ = (annotations.number(word, place, key) for word, key in zip(words[1:], "xywhs", strict=False))
    return Marked(place, classes[int(words[0])], (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
