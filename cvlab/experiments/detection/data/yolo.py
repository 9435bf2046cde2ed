"""Read boxes in YOLO's format: images/SPLIT, labels/SPLIT, and a line `class x y w h` in fractions for each object.

References: docs.ultralytics.com/datasets/detect. x and y are the center; all four are divided by the width or height of
the image. SPLIT/images with SPLIT/labels, and images with labels without splits, are read too. The classes are those of
data.yaml (`names`) or classes.txt. An image without a label file has no objects.
"""

from pathlib import Path

from cvlab.config import strict_yaml
from cvlab.data import files
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import (
    SPLIT_ALIASES,
    SPLITS,
    AnnotationSet,
    ImageAnnotation,
    ObjectAnnotation,
)

LINE_FORMAT = "class x y w h"
CLASS_FILES = ("classes.txt", "labels/classes.txt", "obj.names")


def matches(folder: Path) -> bool:
    """Whether a folder has images and labels."""
    return bool(_find_folders(folder))


def _find_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and of labels of each split."""
    by_split = {}
    for split in SPLITS:
        for name in SPLIT_ALIASES[split]:
            for images, labels in ((f"images/{name}", f"labels/{name}"), (f"{name}/images", f"{name}/labels")):
                if (folder / images).is_dir() and (folder / labels).is_dir():
                    by_split[split] = (folder / images, folder / labels)
    if not by_split and (folder / "images").is_dir() and (folder / "labels").is_dir():
        by_split["train"] = (folder / "images", folder / "labels")
    return by_split


def read_folder(folder: Path) -> AnnotationSet:
    """Read all images of a folder."""
    classes = _read_classes(folder)
    splits = {split: _read_split(*folders, classes) for split, folders in _find_folders(folder).items()}
    return AnnotationSet("YOLO", splits, classes)


def _read_classes(folder: Path) -> tuple[str, ...]:
    """Return the classes, by number."""
    candidates = [folder / "data.yaml", folder / "data.yml", folder / "dataset.yaml"]
    file = next((file for file in candidates if file.is_file()), None)
    if file is not None:
        return _names_of(file)
    lists = [folder / name for name in CLASS_FILES if (folder / name).is_file()]
    if not lists:
        raise DataError(f"{folder}: neither data.yaml nor classes.txt", "one of them names the classes")
    return tuple(line for _, line in files.read_lines(lists[0]))


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
        location = document.location(("names",))
        raise DataError(f"{location}: names is no list of classes", "write `names: [cat, dog]`")
    return tuple(str(name) for name in names)


def _read_split(image_folder: Path, label_folder: Path, classes: tuple[str, ...]) -> list[ImageAnnotation]:
    """Read the images of a split."""
    images = annotations.images_by_stem(image_folder)
    label_files = {path.stem: path for path in sorted(label_folder.glob("*.txt")) if path.name != "classes.txt"}
    for stem, path in label_files.items():
        if stem not in images:
            raise DataError(f"{path}: {image_folder} has no photo {stem}", "add the photo, or remove the labels")
    return [_read_image(images[stem], label_files.get(stem), label_folder, classes) for stem in sorted(images)]


def _read_image(image: Path, file: Path | None, label_folder: Path, classes: tuple[str, ...]) -> ImageAnnotation:
    """Read the label file of an image, if it has one."""
    lines = files.read_lines(file) if file is not None else []
    objects = tuple(_parse_line(line, f"{file}:{number}", classes) for number, line in lines)
    return ImageAnnotation(image, file or label_folder, objects, relative=True)


def _parse_line(line: str, location: str, classes: tuple[str, ...]) -> ObjectAnnotation:
    """Parse one line; a sixth number is the score of a detection, which is ignored."""
    values = line.split()
    if len(values) not in (5, 6):
        problem = f"{len(values)} words where `{LINE_FORMAT}` is expected"
        raise DataError(f"{location}: {problem}", "outlines and points are not boxes")
    if not values[0].isdecimal() or int(values[0][:9]) >= len(classes):
        raise DataError(f"{location}: class {values[0][:40]!r} is none of 0..{len(classes) - 1}", "correct it")
    x, y, w, h, *_ = (
        annotations.parse_number(value, location, key) for value, key in zip(values[1:], "xywhs", strict=False)
    )
    return ObjectAnnotation(location, classes[int(values[0])], (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
