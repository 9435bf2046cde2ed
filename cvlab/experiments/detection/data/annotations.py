"""What the readers of annotations have in common: what they give, numbers, lists of files, headers of photos.

boxfiles_voc.py, boxfiles_coco.py and boxfiles_yolo.py read; boxsets.py makes tensors of what they give.
"""

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from cvlab.data import photos
from cvlab.errors import DataError

MAX_BYTES = 5_000_000  # of a text about one photo, or of a list
SPLITS = ("train", "val", "test")
ALSO_CALLED = {"val": ("val", "valid", "validation"), "train": ("train",), "test": ("test",)}
PNG_START, PNG_LATE = 8, (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks in which a PNG may say how to turn it

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Marked:
    """One object as a file describes it: `place` says where in the file; a point for a box without area."""

    place: str
    name: str
    box_xyxy: Box
    difficult: bool = False


@dataclass(frozen=True)
class Annotated:
    """One photo as a file describes it.

    `size` is its width and height as the file claims them, where it does; boxes are in pixels from 0, right and bottom
    edges exclusive, or, where `relative` is set, in fractions of the width and height.
    """

    image: Path
    file: Path
    objects: tuple[Marked, ...]
    size: tuple[int, int] | None = None
    relative: bool = False


@dataclass(frozen=True)
class Layout:
    """A folder as read: `kind` of files, the classes where the files list them, and the photos of each split."""

    kind: str
    splits: dict[str, list[Annotated]]
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Header:
    """Width and height of a photo as its pixels are stored, and how EXIF wants it turned: 1 to 8."""

    width: int
    height: int
    orientation: int


def header(path: Path) -> Header:
    """Read the size of a photo without decoding it. DataError where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes, which photos.load looks at, and about EXIF
            with Image.open(path, formats=photos.FORMATS) as image:
                known = image.format != "PNG" or "exif" in image.info or _says_more(path)
                orientation = image.getexif().get(Base.Orientation, 1) if known else 1
                valid = isinstance(orientation, int) and 1 <= orientation <= 8
                return Header(image.width, image.height, orientation if valid else 1)
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a photo that can be read", photos.FORMAT_HINT) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "the annotations name this photo") from error
    except Exception as error:  # decoders of damaged files fail in many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: cannot be decoded: {reason}", "the file is damaged") from error


def _says_more(path: Path) -> bool:
    """Whether a PNG has a chunk that could say how to turn it. Pillow would decode every PNG to find out."""
    with path.open("rb") as file:
        file.seek(PNG_START)
        while len(head := file.read(8)) == 8:
            if head[4:] in PNG_LATE:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def photos_in(folder: Path) -> dict[str, Path]:
    """Return the photos of a folder by their names without ending; of several of a name the first in ENDINGS."""
    found: dict[str, Path] = {}
    for entry in sorted(_listed(folder), key=lambda path: photos.SUFFIXES[::-1].index(path.suffix.lower())):
        found[entry.stem] = entry
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "name a folder that can be read") from error
    return [folder / name for name in names if name.lower().endswith(photos.SUFFIXES) and name[0] != "."]


def read_bytes(path: Path, most: int = MAX_BYTES, missing: str = "name a file that can be read") -> bytes:
    """Read a file of at most `most` bytes; DataError otherwise."""
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}", missing) from error
    if len(raw) > most:
        raise DataError(f"{path}: larger than {most // 10**6} MB", "this is no annotation")
    return raw


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not empty, with their numbers, from 1."""
    raw = read_bytes(path)
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{raw[: error.start].count(10) + 1}: not UTF-8 text", "save it as UTF-8") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def number(text: str | None, place: str, key: str) -> float:
    """Return the finite number that a text says; DataError with the place and the key otherwise."""
    try:
        value = float(text or "")
        if math.isfinite(value):
            return value
    except ValueError:
        pass
    raise DataError(f"{place}: {key} is {(text or '')[:40]!r}, not a number", "correct it")


def split_of(word: str) -> str | None:
    """Return the split that a folder or a file called `word` holds."""
    return next((split for split in SPLITS if word.lower() in ALSO_CALLED[split]), None)
