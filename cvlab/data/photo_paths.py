"""Names of photos on the command line and in configurations: files, folders, patterns and bundled samples."""

import glob
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from cvlab import _compat
from cvlab.errors import DataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
PILLOW_MODULES = r"PIL\."
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 200_000_000  # of an image that a run has written: MAX_PIXELS, not compressed
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SAMPLE = "sample"
SAMPLE_PAINTING = "whirls"  # a style image, drawn by experiments/style/sample_painting.py
FORMAT_HINT = "give a JPEG, PNG, BMP or WEBP file"


def ignore_pillow_warnings() -> None:
    """Ignore the warnings of Pillow's modules: about sizes, which `photos.load` checks, and about EXIF.

    `warnings.catch_warnings` would replace and restore the filters of all threads, in one of which photos are decoded.
    """
    if not any(getattr(module, "pattern", "") == PILLOW_MODULES for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=PILLOW_MODULES)


def split_pattern(name: str) -> tuple[str, str]:
    """Return a pattern as a folder that exists, whose name may have brackets, and what is to match within it."""
    folder, pattern = name, ""
    while folder and not os.path.isdir(folder):
        folder, part = os.path.split(folder.rstrip(os.sep))
        pattern = f"{part}{os.sep}{pattern}" if pattern else part
        if not part:
            break
    return folder, pattern


def _has_pattern(name: str) -> bool:
    """Whether a name is a pattern: it has `*`, `?` or `[` in what is no folder's or file's own name."""
    return not os.path.lexists(name) and glob.has_magic(split_pattern(name)[1])


def _is_missing(name: str) -> bool:
    """Whether a name means a file, and there is none."""
    is_file = name not in (SAMPLE, SAMPLE_PAINTING) and "://" not in name and not _has_pattern(name)
    return is_file and not os.path.lexists(name)


def require_any(names: Sequence[str]) -> None:
    """Raise DataError if photos are named, and all of them are files that do not exist."""
    if names and all(map(_is_missing, names)):
        raise DataError(f"{names[0]}: no such file", f"`{SAMPLE}` is a bundled photo")


def require_all(names: Sequence[str]) -> None:
    """Raise DataError if one of the names is a file that does not exist."""
    for name in filter(_is_missing, names):
        raise DataError(
            f"{name}: no such file", f"`{SAMPLE}` is a bundled photo, `{SAMPLE_PAINTING}` a bundled painting"
        )


def find_images(names: Iterable[str]) -> list[Path]:
    """Return the paths of all photos meant by `names`, without duplicates.

    Args:
        names: Files, folders (their photos, sorted), patterns (`photos/*.jpg`) and `sample`, a bundled photo.

    Returns:
        The paths; a file that is named is returned whether it exists or not.

    Raises:
        DataError: A folder or a pattern matches no photo.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if name == SAMPLE:
            paths.append(_compat.sample_photo())
        elif "://" in name:
            raise DataError(f"{name}: URLs are not downloaded", "save the photo and give its file")
        elif os.path.isdir(name):
            paths += _list_folder(path)
        elif _has_pattern(name):
            folder, pattern = split_pattern(name)
            matched = sorted(glob.glob(pattern, root_dir=folder or None, recursive=True))
            matches = [path for match in matched if (path := Path(folder, match)).is_file()]
            if not matches:
                raise DataError(f"{name}: matches no file", FORMAT_HINT)
            paths += matches
        else:
            paths.append(path)
    return list(dict.fromkeys(paths))


def _list_folder(folder: Path) -> list[Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "give a folder that can be read") from error
    if not paths:
        raise DataError(f"{folder}: no photos in this folder", FORMAT_HINT)
    return paths
