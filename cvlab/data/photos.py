"""Photos as people have them: files, folders and patterns; turned, coloured and cut as they come from cameras.

Every photo becomes RGB with 8 bits. Nothing that is read can take unbounded memory: the size is looked at before
anything is decoded, and only four well-known decoders are used.
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
ANOTHER = "give a JPEG, PNG, BMP or WEBP file"


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


def find_images(named: Iterable[str]) -> list[Path]:
    """Return the photos meant by files, folders (their photos, sorted), patterns (`photos/*.jpg`) and `sample`.

    A file that is named is returned whether it is there or not. DataError where a folder or a pattern gives none.
    """
    found: list[Path] = []
    for name in named:
        path = Path(name)
        if name == SAMPLE:
            found.append(_compat.sample_photo())
        elif "://" in name:
            raise DataError(f"{name}: addresses are not fetched", "save the photo and name its file")
        elif os.path.isdir(name):
            found += _of_folder(path)
        elif glob.has_magic(name) and not os.path.lexists(name):
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
            if not matches:
                raise DataError(f"{name}: fits no file", ANOTHER)
            found += matches
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _of_folder(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "name a folder that can be read") from error
    if not found:
        raise DataError(f"{folder}: no photos in this folder", ANOTHER)
    return found


def load(path: Path) -> Image.Image:
    """Read a photo as 8-bit RGB, turned as its EXIF says, transparency over white. DataError says what is wrong."""
    if not path.is_file():
        hint = "no photo at hand? `sample` names one that comes along" if not os.path.lexists(path) else ANOTHER
        raise DataError(f"{path}: no such file" if not os.path.lexists(path) else f"{path}: not a file", hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes, which are looked at here, and about EXIF
            with Image.open(path, formats=FORMATS) as image:
                _require_size(path, image.size)
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more than {MAX_PIXELS // 10**6} megapixels", "make it smaller") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a photo that can be read", ANOTHER) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "the file is damaged, or cannot be read") from error
    except Exception as error:  # decoders of damaged files fail in many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: cannot be decoded: {reason}", "the file is damaged") from error


def _require_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: {width} x {height} is more than {MAX_PIXELS // 10**6} megapixels", "make it smaller")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB: 16 bits are scaled to 8, transparency is laid over white."""
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
    """Round (3, H, W) in [0, 1] to an 8-bit RGB photo; what lies outside is clamped."""
    rounded = pixels.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return Image.fromarray(rounded.permute(1, 2, 0).cpu().numpy())
