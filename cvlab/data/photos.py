"""Find and read the user's photos: files, folders and patterns; any color mode, bit depth and EXIF orientation.

Every photo becomes 8-bit RGB. Reading cannot take unbounded memory: the size is checked before anything is decoded, and
only four well-known decoders are enabled.
"""

import contextlib
import functools
import io
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from torch import Tensor

from cvlab import console
from cvlab.data.photo_paths import FORMAT_HINT, FORMATS, MAX_PIXELS
from cvlab.errors import DataError

MAX_METADATA_BYTES = 1_000_000
JPEG_END = b"\xff\xd9"


class _NoWarnings:
    """Ignore warnings while a thread is inside.

    `warnings.catch_warnings` changes what all threads share, and threads that overlap would leave it changed: so the
    first one enters it, and the last one leaves it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._filters: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0 and self._filters is not None:
                self._filters.__exit__(None, None, None)


_no_warnings = _NoWarnings()


def load(path: Path) -> Image.Image:
    """Read a photo as 8-bit RGB, rotated as its EXIF orientation says, transparency over white. Raises DataError."""
    if not path.is_file():
        hint = "no photo at hand? `sample` is a bundled one" if not os.path.lexists(path) else FORMAT_HINT
        raise DataError(f"{path}: no such file" if not os.path.lexists(path) else f"{path}: not a file", hint)
    return _decode(path, path)


def decode(content: bytes, path: Path) -> Image.Image:
    """Return the photo in a file's content as `load` does; `path` names it in errors. Raises DataError."""
    return _decode(io.BytesIO(content), path)


def _decode(source: Path | io.BytesIO, path: Path) -> Image.Image:
    try:
        # Pillow warns about sizes, which are checked below, and about EXIF
        with _no_warnings, Image.open(source, formats=FORMATS) as image:
            _check_size(path, image.size)
            try:
                image.load()
            except OSError:
                completed = _complete_jpeg(source) if image.format == "JPEG" else None
                if completed is None:
                    raise
                _warn_once(f"{path}: lacks the end marker of a JPEG; every pixel could be read")
                return to_rgb(ImageOps.exif_transpose(completed))
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


def read_metadata(path: Path) -> dict[str, bytes]:
    """Return the EXIF data and the color profile of a photo for a copy that `load` has rotated and made RGB.

    The keys are those that Pillow's `save` takes. The orientation is left out, and so is a profile that is not of RGB,
    and what is damaged or larger than `MAX_METADATA_BYTES`.
    """
    metadata: dict[str, bytes] = {}
    # decoders raise many types of errors
    with contextlib.suppress(Exception), _no_warnings, Image.open(path, formats=FORMATS) as image:
        profile = image.info.get("icc_profile") or b""
        if profile[16:20] == b"RGB ":
            metadata["icc_profile"] = profile
        exif = image.getexif()
        exif.pop(Base.Orientation, None)
        if len(exif):
            metadata["exif"] = exif.tobytes()
    return {key: value for key, value in metadata.items() if len(value) <= MAX_METADATA_BYTES}


def _complete_jpeg(source: Path | io.BytesIO) -> Image.Image | None:
    """Decode a JPEG of which only the end marker, the last two bytes, is missing; None if pixels are missing too.

    Where pixels are missing, the decoder takes them from what is put in front of the marker.
    """
    raw = (source.read_bytes() if isinstance(source, Path) else source.getvalue()).removesuffix(b"\xff")
    images = []
    for filler in (b"", b"\x55" * 64, b"\xa9\x13" * 32):
        image = Image.open(io.BytesIO(raw + filler + JPEG_END), formats=["JPEG"])
        try:
            image.load()
        except OSError:
            return None
        images.append(image)
    return images[0] if all(image.tobytes() == images[0].tobytes() for image in images) else None


@functools.cache
def _warn_once(text: str) -> None:
    console.info(f"warning: {text}")


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


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """Return RGB photos of one size as float32 (N, 3, H, W) in [0, 1], channels last."""
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return batch.permute(0, 3, 1, 2).float().div_(255)


def to_image(pixels: Tensor) -> Image.Image:
    """Round pixels (3, H, W) in [0, 1] to an 8-bit RGB image; values outside are clamped."""
    rounded = pixels.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return Image.fromarray(rounded.permute(1, 2, 0).cpu().numpy())
