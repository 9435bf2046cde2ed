"""SVHN (Netzer et al., 2011), cropped digits: `<root>/svhn/` holds train_32x32.mat and test_32x32.mat."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from cvlab.errors import DataError
from cvlab.experiments.classification.data.images import ImageDataset
from cvlab.experiments.classification.data.published import Download, PublishedFiles

FILES = PublishedFiles(
    "svhn",
    "svhn",
    [
        Download(
            "train_32x32.mat",
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            182_040_794,
            ("http://ufldl.stanford.edu/housenumbers/train_32x32.mat",),
        ),
        Download(
            "test_32x32.mat",
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            64_275_384,
            ("http://ufldl.stanford.edu/housenumbers/test_32x32.mat",),
        ),
    ],
)
HEADER_BYTES = 128
COMPRESSED, MATRIX = 15, 14
DTYPES = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}


def parse_mat(raw: bytes, name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a MATLAB file, level 5, little-endian, with nothing but arrays of numbers.

    Args:
        raw: The file.
        name: For messages.

    Returns:
        The arrays by name.

    Raises:
        DataError: It is damaged, or of another kind.

    References:
        The MathWorks, "MAT-File Format", level 5.
    """
    arrays = {}
    try:
        offset = HEADER_BYTES
        while offset < len(raw):
            kind, content, _ = _element(raw, offset)
            offset += 8 + len(content)  # compressed elements are not padded
            if kind == COMPRESSED:
                kind, content, _ = _element(zlib.decompress(content), 0)
            if kind != MATRIX:
                raise ValueError(f"an element of kind {kind}")
            label, array = _matrix(content)
            arrays[label] = array
    except (struct.error, zlib.error, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{name}: not a MATLAB file of level 5: {error}") from error
    return arrays


def _element(raw: bytes, offset: int) -> tuple[int, bytes, int]:
    """Return the kind and the content of an element, and the offset of the next, padded one."""
    kind, size = struct.unpack_from("<II", raw, offset)
    if kind >> 16:  # a small element: both in four bytes, then up to four bytes of content
        kind, size = kind & 0xFFFF, kind >> 16
        return kind, raw[offset + 4 : offset + 4 + size], offset + 8
    start = offset + 8
    if start + size > len(raw):
        raise ValueError("it is cut off")
    return kind, raw[start : start + size], start + (size + 7) // 8 * 8


def _matrix(content: bytes) -> tuple[str, np.ndarray]:
    """Return the name of an array and its numbers: flags, dimensions, name and real part, one after another."""
    parts, offset = [], 0
    for _ in range(4):
        kind, part, offset = _element(content, offset)
        parts.append((kind, part))
    shape = np.frombuffer(parts[1][1], "<i4").tolist()
    kind, numbers = parts[3]
    return parts[2][1].decode("ascii"), np.frombuffer(numbers, DTYPES[kind]).reshape(shape, order="F")


def _split(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    path = str(root / FILES.folder / name)
    arrays = parse_mat(FILES.read(root, name), path)
    if not {"X", "y"} <= arrays.keys():
        raise DataError(f"{path}: no arrays X and y", FILES.hint)
    images = np.ascontiguousarray(arrays["X"].transpose(3, 0, 1, 2))
    labels = arrays["y"].astype(np.int64).ravel() % 10  # the digit 0 is labeled 10
    return torch.from_numpy(images), torch.from_numpy(labels)


def load(root: Path) -> ImageDataset:
    """Read the data set. Raises DataError naming a file that is missing or differs from the published one."""
    train, test = _split(root, "train_32x32.mat"), _split(root, "test_32x32.mat")
    return ImageDataset("svhn", *train, *test, classes=tuple("0123456789"))


SOURCE = FILES.source(load)
