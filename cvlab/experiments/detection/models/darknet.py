"""Weights as darknet (Redmon, 2013-2018) writes them: a header, then the numbers of each convolution, nothing else.

Header: major, minor, revision as int32; how many photos were seen, as int64 from version 0.2 on and as int32 before.
Of a convolution: biases, the normalisation's factors, means and variances where it has one, then the weights, all
float32. All is little-endian. Source: `load_weights_upto` in darknet's parser.c.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvlab.errors import DataError

EPS = 1e-5  # of the normalisation on a GPU, as the nets were trained


@dataclass(frozen=True)
class Conv:
    """A convolution of a net in the order of the file; `has_norm` where a normalisation follows it."""

    name: str
    inside: int
    outside: int
    size: int
    has_norm: bool = True

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of its arrays in the order of the file."""
        vectors = ("bias", "factor", "mean", "variance") if self.has_norm else ("bias",)
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.{part}": (self.outside,) for part in vectors}
        return shapes | {f"{self.name}.weight": (self.outside, self.inside, self.size, self.size)}


def read_darknet(path: Path, convs: Sequence[Conv], hint: str = "") -> dict[str, Tensor]:
    """Return the arrays of a file by name: `NAME.bias`, `.factor`, `.mean`, `.variance` and `.weight`.

    DataError, with `hint`, unless the file holds just these: its size is looked at before anything is read.
    """
    shapes = {name: shape for conv in convs for name, shape in conv.parts().items()}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if os.path.lexists(path) else 'no such file'}", hint)
    try:
        with path.open("rb") as file:
            header = _header_bytes(file.read(12))
            wanted, size = header + 4 * count, os.fstat(file.fileno()).st_size
            if size != wanted:
                raise DataError(f"{path}: {size:,} bytes, where this net's weights have {wanted:,}", hint)
            file.seek(header)
            numbers = torch.from_numpy(np.fromfile(file, dtype="<f4", count=count))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint) from error
    if len(numbers) != count:
        raise DataError(f"{path}: ended after {header + 4 * len(numbers):,} of {wanted:,} bytes", hint)
    if not torch.isfinite(numbers).all():
        raise DataError(f"{path}: holds numbers that are not finite", hint)
    pieces = numbers.split([int(np.prod(shape)) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _header_bytes(start: bytes) -> int:
    """Return how long the header is, from the version at its start."""
    if len(start) < 12:  # the file ends here, and is refused for its size
        return 20
    major, minor, _ = struct.unpack("<3i", start)
    return 20 if major * 10 + minor >= 2 and major < 1000 and minor < 1000 else 16


def folded(raw: dict[str, Tensor], convs: Sequence[Conv]) -> dict[str, Tensor]:
    """Put the normalisations into the convolutions before them: `NAME.weight` and `NAME.bias` only."""
    found: dict[str, Tensor] = {}
    for conv in convs:
        weight, bias = raw[f"{conv.name}.weight"], raw[f"{conv.name}.bias"]
        if conv.has_norm:
            scale = raw[f"{conv.name}.factor"] * torch.rsqrt(raw[f"{conv.name}.variance"] + EPS)
            weight, bias = weight * scale.view(-1, 1, 1, 1), bias - raw[f"{conv.name}.mean"] * scale
        found |= {f"{conv.name}.weight": weight, f"{conv.name}.bias": bias}
    return found
