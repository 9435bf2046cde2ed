"""What the readers of annotation files return, and the helpers that they share.

voc.py, coco.py and yolo.py read one format each; dataset.py makes tensors of what they return.
"""

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from cvlab.data import photo_paths
from cvlab.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {"val": ("val", "valid", "validation"), "train": ("train",), "test": ("test",)}
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
class AnnotationSet:
    """A folder as read: the name of its format, the images of each split, and the classes if its files list them."""

    format: str
    splits: dict[str, list[ImageAnnotation]]
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ImageHeader:
    """Width and height of the stored pixels, and the EXIF orientation, 1 to 8, in which to show them."""

    width: int
    height: int
    orientation: int


def read_header(path: Path) -> ImageHeader:
    """Read an image's size and orientation without decoding its pixels. DataError if it is not an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about sizes, which photos.load checks, and about EXIF
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


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by file stem; of several with one stem, the one whose suffix comes first."""
    images: dict[str, Path] = {}
    for path in sorted(_list_images(folder), key=lambda path: photo_paths.SUFFIXES[::-1].index(path.suffix.lower())):
        images[path.stem] = path
    return images


def _list_images(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "name a folder that can be read") from error
    return [folder / name for name in names if name.lower().endswith(photo_paths.SUFFIXES) and name[0] != "."]


def parse_number(text: str | None, location: str, key: str) -> float:
    """Parse a finite number. DataError with the location and the key otherwise."""
    try:
        value = float(text or "")
        if math.isfinite(value):
            return value
    except ValueError:
        pass
    raise DataError(f"{location}: {key} is {(text or '')[:40]!r}, not a number", "correct it")


def split_named(name: str) -> str | None:
    """Return the split that a folder or file called `name` holds, or None."""
    return next((split for split in SPLITS if name.lower() in SPLIT_ALIASES[split]), None)
