"""What the readers of annotation files return, and the helpers that they share.

voc.py, coco.py and yolo.py read one format each; dataset.py makes tensors of what they return.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from cvlab.data import files, photo_paths
from cvlab.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
TRUE_WORDS, FALSE_WORDS = ("1", "true", "yes"), ("0", "false", "no", "")
SHOWN_LOCATIONS = 3
PNG_SIGNATURE_BYTES = 8
PNG_ORIENTATION_CHUNKS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ObjectAnnotation:
    """One object as a file describes it.

    Attributes:
        location: Where in the file it is, for messages.
        name: Its class.
        box_xyxy: A box of zero width and height if the file gives one without area.
        difficult: Ignored in evaluation and not used in training: VOC's `difficult`, COCO's `iscrowd`.
        crowd: Also a box around many objects, COCO's `iscrowd`, of which every one may be detected.
    """

    location: str
    name: str
    box_xyxy: Box
    difficult: bool = False
    crowd: bool = False


@dataclass(frozen=True)
class ImageAnnotation:
    """One image as a file describes it.

    Attributes:
        image: The image's file.
        file: The annotation's file.
        objects: Their boxes are in pixels from 0, right and bottom edges exclusive.
        size: Width and height as the annotation claims them, if it does.
        relative: Boxes are in fractions of width and height instead.
    """

    image: Path
    file: Path
    objects: tuple[ObjectAnnotation, ...]
    size: tuple[int, int] | None = None
    relative: bool = False


@dataclass(frozen=True)
class Irregularities:
    """What was repaired or left out: the location of each case, by a description of its kind."""

    cases: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, location: str | Path) -> None:
        """Record a case."""
        self.cases.setdefault(kind, []).append(str(location))

    def lines(self) -> list[str]:
        """Return one line for each kind: how many cases, and where the first ones are."""
        return [f"{kind}: {count_locations(locations)}" for kind, locations in self.cases.items()]


def count_locations(locations: Sequence[str]) -> str:
    """Return how many locations there are, and the first of them."""
    shown = ", ".join(locations[:SHOWN_LOCATIONS])
    return f"{len(locations)} ({shown}{', ...' if len(locations) > SHOWN_LOCATIONS else ''})"


@dataclass(frozen=True)
class AnnotationSet:
    """A folder as read.

    Attributes:
        format: The name of its format.
        splits: The images of each split.
        classes: The classes if its files list them.
        irregularities: What the reader repaired or left out.
    """

    format: str
    splits: dict[str, list[ImageAnnotation]]
    classes: tuple[str, ...] | None = None
    irregularities: Irregularities = field(default_factory=Irregularities)


@dataclass(frozen=True)
class ImageHeader:
    """Width and height of the stored pixels, and the EXIF orientation, 1 to 8, in which to show them."""

    width: int
    height: int
    orientation: int


def read_header(path: Path) -> ImageHeader:
    """Read an image's size and orientation without decoding its pixels. DataError if it is not an image."""
    try:
        photo_paths.ignore_pillow_warnings()
        with Image.open(path, formats=photo_paths.FORMATS) as image:
            has_exif = image.format != "PNG" or "exif" in image.info or _has_orientation_chunk(path)
            orientation = image.getexif().get(Base.Orientation, 1) if has_exif else 1
            valid = isinstance(orientation, int) and 1 <= orientation <= 8
            return ImageHeader(image.width, image.height, orientation if valid else 1)
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a photo that can be read", photo_paths.FORMAT_HINT) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "the annotations name this photo") from error
    except Exception as error:  # decoders of damaged files fail in many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: cannot be decoded: {reason}", "the file is damaged") from error


def _has_orientation_chunk(path: Path) -> bool:
    """Whether a PNG has a chunk that may hold an orientation. Pillow would decode every PNG to find out."""
    with path.open("rb") as file:
        file.seek(PNG_SIGNATURE_BYTES)
        while len(head := file.read(8)) == 8:
            if head[4:] in PNG_ORIENTATION_CHUNKS:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


class PhotoIndex:
    """The photos of a folder, by the names that annotation files give them.

    Attributes:
        photos: Without those that share their folder and stem with another photo whose suffix comes earlier in
            `photo_paths.SUFFIXES`; sorted by folder and stem.
        duplicates: The photos left out for that reason.
    """

    def __init__(self, folder: Path, is_recursive: bool = True) -> None:
        self.folder = folder
        by_stem: dict[tuple[Path, str], list[Path]] = {}
        for path in files.list_files(folder, photo_paths.SUFFIXES, is_recursive):
            by_stem.setdefault((path.parent, path.stem), []).append(path)
        for paths in by_stem.values():
            paths.sort(key=lambda path: (photo_paths.SUFFIXES.index(path.suffix.lower()), path.name))
        self.photos = [by_stem[key][0] for key in sorted(by_stem)]
        self.duplicates = [path for key in sorted(by_stem) for path in by_stem[key][1:]]
        self._by_name: dict[str, list[Path]] = {}
        for path in [*self.photos, *self.duplicates]:
            relative = path.relative_to(folder)
            for name in {str(relative), str(relative.with_suffix("")), path.name, path.stem}:
                self._by_name.setdefault(name, []).append(path)

    def find(self, *names: str) -> Path | None:
        """Return the photo with the first of some names, relative paths or file names with or without suffix."""
        for name in names:
            candidates = self._by_name.get(name.replace("\\", "/").removeprefix("./"), [])
            folders = {path.parent for path in candidates}
            if len(folders) == 1 or (candidates and self.folder in folders):
                return next(path for path in candidates if len(folders) == 1 or path.parent == self.folder)
        return None


def parse_number(value: object) -> float | None:
    """Return a finite number that a file has as a number or as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_flag(value: object) -> bool | None:
    """Return a flag that a file has as a number, a boolean or a word; None if it is neither true nor false."""
    if value is None:
        return False
    if not isinstance(value, bool | int | float | str):
        return None
    word = str(value).strip().lower().removesuffix(".0")
    return True if word in TRUE_WORDS else False if word in FALSE_WORDS else None


def split_named(name: str) -> str | None:
    """Return the split that a folder or file called `name` holds, as `train`, `val2017`, `images_test`, or None."""
    tokens = re.findall(r"[a-z]+", name.lower())
    splits = {split for split in SPLITS for token in tokens if token in SPLIT_ALIASES[split]}
    return splits.pop() if len(splits) == 1 else None
