"""Find and read the user's photos: files, folders and patterns; any color mode, bit depth and EXIF orientation.

Every photo becomes 8-bit RGB. Reading cannot take unbounded memory: the size is checked before anything is decoded, and
only four well-known decoders are enabled.
"""

import glob
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cvlab import _compat
from cvlab.errors import DataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MAX_PIXELS = 50_000_000
SAMPLE = "sample"
SAMPLE_PAINTING = "whirls"  # a style image, drawn by experiments/style/sample_painting.py
FORMAT_HINT = "give a JPEG, PNG, BMP or WEBP file"


def _is_missing(name: str) -> bool:
    """Whether a name means a file, and there is none."""
    is_file = name not in (SAMPLE, SAMPLE_PAINTING) and "://" not in name and not glob.has_magic(name)
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
        DataError: If a folder or a pattern matches no photo.
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
        elif glob.has_magic(name) and not os.path.lexists(name):
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
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


def load(path: Path) -> Image.Image:
    """Read a photo as 8-bit RGB, rotated as its EXIF orientation says, transparency over white. Raises DataError."""
    if not path.is_file():
        hint = "no photo at hand? `sample` is a bundled one" if not os.path.lexists(path) else FORMAT_HINT
        raise DataError(f"{path}: no such file" if not os.path.lexists(path) else f"{path}: not a file", hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about sizes, which are checked below, and about EXIF
            with Image.open(path, formats=FORMATS) as image:
                _check_size(path, image.size)
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more than {MAX_PIXELS // 10**6} megapixels", "make it smaller") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a photo that can be read", FORMAT_HINT) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "the file is damaged, or cannot be read") from error
    except Exception as error:  # decoders raise many types of errors for damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: cannot be decoded: {reason}", "the file is damaged") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: {width} x {height} is more than {MAX_PIXELS // 10**6} megapixels", "make it smaller")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB: 16 bits are scaled to 8, transparency is composited over white."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int64)
        image = Image.fromarray(((np.clip(values, 0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB photo as float32 (3, H, W) in [0, 1]."""
    array: Any = np.asarray(image)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(255).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Round pixels (3, H, W) in [0, 1] to an 8-bit RGB image; values outside are clamped."""
    rounded = pixels.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return Image.fromarray(rounded.permute(1, 2, 0).cpu().numpy())
