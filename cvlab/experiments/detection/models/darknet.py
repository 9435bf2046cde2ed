"""Read the weights format of darknet (Redmon, 2013-2018): a header, then the arrays of each convolution.

The header: major, minor and revision as int32; the number of images seen, int64 from version 0.2 on, int32 before. Of
each convolution: biases; scales, means and variances if it has batch norm; weights. All float32, little-endian.
References: `load_weights_upto` in darknet's parser.c.
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

EPS = 1e-5  # of the batch norm on a GPU, where the models were trained


@dataclass(frozen=True)
class ConvSpec:
    """A convolution in the order of the file; `has_norm` if a batch norm follows it."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    has_norm: bool = True

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of its arrays in the order of the file."""
        vectors = ("bias", "scale", "mean", "variance") if self.has_norm else ("bias",)
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.{part}": (self.out_channels,) for part in vectors}
        weight = (self.out_channels, self.in_channels, self.kernel_size, self.kernel_size)
        return shapes | {f"{self.name}.weight": weight}


def read_darknet(path: Path, convs: Sequence[ConvSpec], hint: str = "") -> dict[str, Tensor]:
    """Return the arrays of a file by name: `NAME.bias`, `.scale`, `.mean`, `.variance` and `.weight`.

    DataError, with `hint`, unless the file holds exactly these: its size is checked before anything is read.
    """
    shapes = {name: shape for conv in convs for name, shape in conv.arrays().items()}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if os.path.lexists(path) else 'no such file'}", hint)
    try:
        with path.open("rb") as file:
            header = _header_bytes(file.read(12))
            expected, size = header + 4 * count, os.fstat(file.fileno()).st_size
            if size != expected:
                raise DataError(f"{path}: {size:,} bytes, but this model's weights have {expected:,}", hint)
            file.seek(header)
            values = torch.from_numpy(np.fromfile(file, dtype="<f4", count=count))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint) from error
    if len(values) != count:
        raise DataError(f"{path}: ended after {header + 4 * len(values):,} of {expected:,} bytes", hint)
    if not torch.isfinite(values).all():
        raise DataError(f"{path}: holds numbers that are not finite", hint)
    pieces = values.split([int(np.prod(shape)) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _header_bytes(start: bytes) -> int:
    """Return the length of the header, from the version at its start."""
    if len(start) < 12:  # a file this short is rejected for its size
        return 20
    major, minor, _ = struct.unpack("<3i", start)
    return 20 if major * 10 + minor >= 2 and major < 1000 and minor < 1000 else 16


def fold_batch_norms(arrays: dict[str, Tensor], convs: Sequence[ConvSpec]) -> dict[str, Tensor]:
    """Fold each batch norm into the convolution before it; return `NAME.weight` and `NAME.bias` only."""
    state: dict[str, Tensor] = {}
    for conv in convs:
        weight, bias = arrays[f"{conv.name}.weight"], arrays[f"{conv.name}.bias"]
        if conv.has_norm:
            scale = arrays[f"{conv.name}.scale"] * torch.rsqrt(arrays[f"{conv.name}.variance"] + EPS)
            weight, bias = weight * scale.view(-1, 1, 1, 1), bias - arrays[f"{conv.name}.mean"] * scale
        state |= {f"{conv.name}.weight": weight, f"{conv.name}.bias": bias}
    return state
