"""Read boxes in YOLO's format: a line `class x y w h` in fractions for each object, a label file for each photo.

References: docs.ultralytics.com/datasets/detect. x and y are the center; all four are divided by the width or height of
the image. Which photos belong to which split is what data.yaml says (`train`, `val`, `test`: folders, lists of photos,
or several of them), else what the folders are called: images/train, train/images, images/train2017, ... The label file
of images/a.jpg is labels/a.txt, or a.txt beside the photo. The classes are those of data.yaml (`names`) or classes.txt.
An image without a label file has no objects.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cvlab.data import files, photo_paths
from cvlab.errors import DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import (
    SPLIT_ALIASES,
    SPLITS,
    AnnotationSet,
    Box,
    ImageAnnotation,
    Irregularities,
    ObjectAnnotation,
    PhotoIndex,
)
from cvlab.experiments.detection.data.data_yaml import DataFile, Entry

LINE_FORMAT = "class x y w h"
CLASS_FILES = ("classes.txt", "labels/classes.txt", "obj.names", "classes.names", "train/classes.txt")
DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
LABEL_FOLDERS = {"images": "labels", "Images": "Labels", "JPEGImages": "labels", "imgs": "labels", "image": "label"}
MIN_OUTLINE_NUMBERS = 6  # three points


def matches(folder: Path) -> bool:
    """Whether a folder has photos with label files, or a data.yaml that says where they are."""
    data_file = _find_data_file(folder)
    return (data_file is not None and data_file.has_split("train")) or bool(_find_sources(folder))


def has_classes(folder: Path) -> bool:
    """Whether a folder has a file that names the classes."""
    return _find_data_file(folder) is not None or _find_class_list(folder) is not None


def read_path(path: Path) -> AnnotationSet:
    """Read a folder, or the data set that a YAML file describes."""
    folder = path.parent if path.is_file() else path
    data_file = DataFile.read(path) if path.is_file() else _find_data_file(folder)
    irregularities = Irregularities() if data_file is None else data_file.irregularities
    classes = _read_classes(folder, data_file)
    if data_file is not None and any(map(data_file.has_split, SPLITS)):
        sources = _Resolver(data_file, irregularities).sources()
    else:
        sources = _find_sources(folder)
        if not sources:
            raise DataError(f"{path}: names no photos to train on", "write `train: images/train`, or name a folder")
    reader = _Reader(classes, irregularities, data_file.box_columns if data_file else None)
    splits = {split: reader.read(items) for split, items in sources.items()}
    root = data_file.root if data_file is not None else None
    reader.report_unused([base for base in (folder, root) if base is not None])
    return AnnotationSet("YOLO", splits, classes, irregularities)


def _find_data_file(folder: Path) -> DataFile | None:
    """Return the data.yaml of a folder; without one of the usual names, the only YAML file that names classes."""
    by_name = {path.name.lower(): path for path in files.list_files(folder, (".yaml", ".yml"))}
    for name in DATA_FILES:
        if name in by_name:
            return DataFile.read(by_name[name])
    parsed = [DataFile.read(path) for path in by_name.values() if DataFile.has_names(path)]
    if len(parsed) > 1:
        raise DataError(f"{folder}: {len(parsed)} YAML files with classes", "name one of them, or call it data.yaml")
    return parsed[0] if parsed else None


def _find_class_list(folder: Path) -> Path | None:
    return next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)


def _read_classes(folder: Path, data_file: DataFile | None) -> tuple[str, ...]:
    """Return the classes, by number."""
    if data_file is not None:
        return data_file.names
    class_list = _find_class_list(folder)
    if class_list is None:
        raise DataError(f"{folder}: neither data.yaml nor classes.txt", "one of them names the classes")
    return tuple(line for _, line in files.read_lines(class_list))


@dataclass(frozen=True)
class _Source:
    """Photos of a split: those of a folder, or those that a list names with the location of each line."""

    folder: Path | None = None
    photos: tuple[Path, ...] = ()


def _find_sources(folder: Path) -> dict[str, list[_Source]]:
    """Return the photos of each split by the names of folders: the first layout that has photos to train on."""
    children = files.subfolders(folder)
    images = [child for child in children if child.name.lower() in ("images", "jpegimages")]
    has_labels = any(child.name.lower().startswith("label") for child in children)
    by_split: dict[str, list[_Source]] = {}
    for child in [grandchild for path in images for grandchild in files.subfolders(path)] if has_labels else []:
        if split := annotations.split_named(child.name):
            by_split.setdefault(split, []).append(_Source(child))
    for child in children:
        split = annotations.split_named(child.name)
        inner = {path.name.lower(): path for path in files.subfolders(child)} if split else {}
        if split and "images" in inner and "labels" in inner:
            by_split.setdefault(split, []).append(_Source(inner["images"]))
        elif split and _has_labels_beside(child):
            by_split.setdefault(split, []).append(_Source(child))
    if not by_split and images and has_labels:
        return {"train": [_Source(images[0])]}
    if not by_split and (by_split := _find_lists(folder)):
        return by_split
    if not by_split and _has_labels_beside(folder):
        return {"train": [_Source(folder)]}
    return by_split


def _has_labels_beside(folder: Path) -> bool:
    """Whether a folder has photos with label files of the same name beside them."""
    stems = {path.stem for path in files.list_files(folder, (".txt",))}
    return any(path.stem in stems for path in files.list_files(folder, photo_paths.SUFFIXES))


def _find_lists(folder: Path) -> dict[str, list[_Source]]:
    """Return the photos of train.txt, valid.txt, ... in a folder with obj.names, as Darknet and CVAT write them."""
    if not (folder / "obj.names").is_file():
        return {}
    resolver = _Resolver(DataFile(folder / "obj.names", ()), Irregularities())
    lists = {path.stem.lower(): path for path in files.list_files(folder, (".txt",))}
    return {
        split: [resolver.read_list(lists[name])]
        for split in SPLITS
        for name in SPLIT_ALIASES[split][::-1]
        if name in lists
    }


class _Resolver:
    """Finds the photos that the entries of a data.yaml stand for."""

    def __init__(self, data_file: DataFile, irregularities: Irregularities) -> None:
        self.data_file, self.irregularities = data_file, irregularities
        self.base = data_file.path.parent
        self.roots = [root for root in (data_file.root, self.base) if root is not None and root.is_dir()]

    def sources(self) -> dict[str, list[_Source]]:
        """Return the photos of each split. DataError if a folder or list to train or validate on is missing."""
        data_file = self.data_file
        if not data_file.has_split("train"):
            raise DataError(f"{data_file.path}: has no `train`", "write which folder or list of photos to train on")
        sources: dict[str, list[_Source]] = {}
        for split in SPLITS:
            for entry in data_file.entries.get(split, ()):
                entry_sources = self._resolve(entry)
                if not entry_sources and split != "test":
                    problem = f"{entry.location}: {split}: {entry.text[:200]}: no such folder or list"
                    raise DataError(problem, "correct the path; it is relative to `path`, or to the YAML file")
                if not entry_sources:
                    self.irregularities.add("folders of `test` that do not exist left out", entry.location)
                sources.setdefault(split, []).extend(entry_sources)
        return sources

    def _resolve(self, entry: Entry) -> list[_Source]:
        """Return the photos that an entry stands for: a folder, a list, a photo, or a pattern of them."""
        text = entry.text.replace("\\", "/")
        for root in self.roots:
            for name in dict.fromkeys((text, text.removeprefix("../"))):
                if os.path.exists(root / name):
                    return [self._to_source(root / name)]
                matches = glob.glob(name, root_dir=root, recursive=True) if glob.has_magic(name) else []
                if matches:
                    return [self._to_source(root / match) for match in sorted(matches)]
        moved = self._find_moved(text, self.base)
        if moved is None:
            return []
        self.irregularities.add("folders of another machine read from beside the YAML file", entry.location)
        return [self._to_source(moved)]

    def _to_source(self, path: Path) -> _Source:
        """Return the photos of a folder, or of a list; a photo stands for itself."""
        if path.is_dir():
            return _Source(path)
        return self.read_list(path) if path.suffix.lower() == ".txt" else _Source(photos=(path,))

    def _find_moved(self, name: str, base: Path) -> Path | None:
        """Return what the end of a path names below a folder: the path was written on another machine.

        A last part alone is enough if it is that of a photo or is called like a split.
        """
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..", ".")]
        last = parts[-1] if parts else ""
        is_last_enough = last.lower().endswith(photo_paths.SUFFIXES) or annotations.split_named(last) is not None
        for start in range(len(parts) - (0 if is_last_enough else 1)):
            path = base.joinpath(*parts[start:])
            if os.path.exists(path):
                return path
        return None

    def read_list(self, path: Path) -> _Source:
        """Return the photos that a list names, one a line: relative to the list, to `path` or to the YAML file."""
        photos = []
        for number, line in files.read_lines(path):
            name = line.replace("\\", "/")
            folders = (path.parent, *self.roots)
            photo = next((folder / name for folder in folders if os.path.isfile(folder / name)), None)
            photo = photo or next((moved for folder in folders if (moved := self._find_moved(name, folder))), None)
            if photo is None or not photo.is_file():
                self.irregularities.add("listed photos that are not on the disk left out", f"{path}:{number}")
            else:
                photos.append(photo)
        if not photos:
            raise DataError(f"{path}: none of its photos is on the disk", "name the photos relative to the list")
        return _Source(photos=tuple(photos))


@dataclass
class _Reader:
    """Reads the label files of photos."""

    classes: tuple[str, ...]
    irregularities: Irregularities
    box_columns: int | None  # numbers in a line with points behind the box; None: such lines are outlines
    listings: dict[Path, dict[str, Path]] = field(default_factory=dict)
    used: set[Path] = field(default_factory=set)
    photo_stems: dict[Path, set[str]] = field(default_factory=dict)
    unknown_classes: list[tuple[str, str]] = field(default_factory=list)

    def read(self, sources: list[_Source]) -> list[ImageAnnotation]:
        """Read the photos of a split. DataError if an object is of no class."""
        photos: dict[Path, None] = {}
        for source in sources:
            if source.folder is None:
                photos |= dict.fromkeys(source.photos)
                continue
            index = PhotoIndex(source.folder)
            photos |= dict.fromkeys(index.photos)
            for duplicate in index.duplicates:
                self.irregularities.add("photos beside another one of the same name left out", duplicate)
        annotated = [self._read_image(photo) for photo in photos]
        if self.unknown_classes:
            (location, number), *others = self.unknown_classes
            problem = f"{location}: class {number[:40]!r} is none of 0..{len(self.classes) - 1}"
            more = f", as in {len(others)} more lines" if others else ""
            raise DataError(f"{problem}{more}", "correct it, or name all classes")
        return annotated

    def _read_image(self, image: Path) -> ImageAnnotation:
        """Read the label file of an image, if it has one."""
        file = self._find_label_file(image)
        if file is None:
            self.irregularities.add("photos without a label file taken as photos without objects", image)
            return ImageAnnotation(image, image, (), relative=True)
        parsed = [self._parse_line(line, f"{file}:{number}") for number, line in files.read_lines(file)]
        return ImageAnnotation(image, file, tuple(obj for obj in parsed if obj is not None), relative=True)

    def _find_label_file(self, image: Path) -> Path | None:
        """Return the label file of an image: in `labels` in place of `images`, or beside it."""
        self.photo_stems.setdefault(image.parent, set()).add(image.stem)
        for folder in _label_folders(image.parent):
            listing = self._list(folder)
            file = listing.get(image.stem) or listing.get(image.name)
            if file is not None:
                self.used.add(file)
                return file
        return None

    def _list(self, folder: Path) -> dict[str, Path]:
        """Return the label files of a folder by stem."""
        if folder not in self.listings:
            paths = files.list_files(folder, (".txt",)) if folder.is_dir() else []
            self.listings[folder] = {path.stem: path for path in paths if path.name.lower() != "classes.txt"}
        return self.listings[folder]

    def _parse_line(self, line: str, location: str) -> ObjectAnnotation | None:
        """Parse one line; None if it is none. A sixth number is the score of a detection, which is ignored."""
        word, *rest = line.split()
        numbers = [annotations.parse_number(value) for value in rest]
        values = [number for number in numbers if number is not None]
        box = self._parse_box(values, location) if len(values) == len(rest) else None
        if box is None:
            self.irregularities.add(f"lines that are not `{LINE_FORMAT}` left out", location)
            return None
        label = self._parse_class(word, location)
        if label is None:
            self.unknown_classes.append((location, word))
            return None
        return ObjectAnnotation(location, self.classes[label], box)

    def _parse_box(self, values: list[float], location: str) -> Box | None:
        """Return the box of a line's numbers: center and sides, perhaps with points behind, or an outline."""
        if self.box_columns is not None and len(values) == self.box_columns:
            values = values[:4]
        if len(values) in (4, 5):
            x, y, w, h = values[:4]
            return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        if len(values) < MIN_OUTLINE_NUMBERS or len(values) % 2:
            return None
        self.irregularities.add("outlines read as the boxes around them", location)
        return (min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2]))

    def _parse_class(self, word: str, location: str) -> int | None:
        """Return the index of a class, given by its number or name; None if there is no such class."""
        number = annotations.parse_number(word)
        if number is None:
            if word not in self.classes:
                return None
            self.irregularities.add("classes given by name", location)
            return self.classes.index(word)
        if not word.isdecimal() and number.is_integer():
            self.irregularities.add("class numbers such as 0.0 read as whole numbers", location)
        is_class = number.is_integer() and 0 <= number < len(self.classes) and not word.startswith("-")
        return int(number) if is_class else None

    def report_unused(self, bases: Sequence[Path]) -> None:
        """Report label files without a photo, and photos in no split: in the same folders, or elsewhere in `images`.

        Of folders called `images` those below one of `bases` are searched.
        """
        for image_folder in sorted(self.photo_stems):
            stems = {path.stem for path in files.list_files(image_folder, photo_paths.SUFFIXES)}
            for label_folder in _label_folders(image_folder)[:-1]:
                for stem, path in sorted(self._list(label_folder).items()):
                    if path not in self.used and stem not in stems and Path(stem).stem not in stems:
                        self.irregularities.add("label files without a photo left out", path)
        roots = {_images_root(folder, bases) for folder in self.photo_stems}
        unused = {
            path
            for root in roots
            for path in files.list_files(root, photo_paths.SUFFIXES, is_recursive=True)
            if path.stem not in self.photo_stems.get(path.parent, ())
        }
        for path in sorted(unused):
            self.irregularities.add("photos in no split left out", path)


def _images_root(folder: Path, bases: Sequence[Path]) -> Path:
    """Return the folder called `images` that has a folder in it and lies below one of `bases`, else the folder."""
    for parent in folder.parents:
        if parent.name in LABEL_FOLDERS and any(parent.is_relative_to(base) for base in bases):
            return parent
    return folder


def _label_folders(image_folder: Path) -> list[Path]:
    """Return the folders in which the label files of a folder's photos may lie; the folder itself comes last."""
    parts = image_folder.parts
    folders = []
    for k in reversed(range(len(parts))):
        if parts[k] in LABEL_FOLDERS:
            names = dict.fromkeys((LABEL_FOLDERS[parts[k]], "labels", "Labels"))
            folders += [Path(*parts[:k], name, *parts[k + 1 :]) for name in names]
            break
    return [*folders, image_folder / "labels", image_folder]
