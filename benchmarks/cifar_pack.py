"""Pack CIFAR-10 losslessly into two zip files of about 50 MiB each, for machines without network.

    python benchmarks/cifar_pack.py pack DATA_FOLDER PACKS
    python benchmarks/cifar_pack.py unpack PACKS DATA_FOLDER

The pixels of a batch become one lossless WebP of 100 x 100 images; the other bytes of the official file are stored
unchanged, so that unpacking gives the official files, whose checksums cvlab verifies. Copy both parts into one
folder, then unpack. The official archive has 163 MiB.
"""

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cvlab.experiments.classification.data.cifar import CIFAR10_FILES

PARTS = {
    "cifar10-1.zip": ("data_batch_1", "data_batch_2", "data_batch_3"),
    "cifar10-2.zip": ("data_batch_4", "data_batch_5", "test_batch", "batches.meta"),
}
GRID = (100, 100)  # rows and columns of images
PIXEL_BYTES = 10_000 * 3072
OPCODES = (b"T", b"B")  # pickle opcodes before length and content: Python 2 string, Python 3 bytes


def pixel_offset(raw: bytes) -> int | None:
    """Return the offset of the pixels in the file of a batch; None if it has no pixels."""
    positions = [raw.find(opcode + PIXEL_BYTES.to_bytes(4, "little")) for opcode in OPCODES]
    return next((position + 5 for position in positions if position >= 0), None)


def to_webp(pixels: bytes) -> bytes:
    """Return the pixels of 10,000 images, plane by plane, as one lossless WebP."""
    rows, columns = GRID
    images = np.frombuffer(pixels, np.uint8).reshape(rows, columns, 3, 32, 32)
    sheet = images.transpose(0, 3, 1, 4, 2).reshape(rows * 32, columns * 32, 3)
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "webp", lossless=True, quality=50, method=4)
    return out.getvalue()


def from_webp(data: bytes) -> bytes:
    """Return the pixels that `to_webp` has encoded."""
    rows, columns = GRID
    sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).tobytes()


def pack(data: Path, packs: Path) -> list[Path]:
    """Write the two parts; DataError if a file of the data set is missing or not the official one."""
    packs.mkdir(parents=True, exist_ok=True)
    for part, names in PARTS.items():
        with zipfile.ZipFile(packs / part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                raw = CIFAR10_FILES.read(data, name)
                start = pixel_offset(raw)
                if start is None:
                    archive.writestr(name, raw)
                    continue
                end = start + PIXEL_BYTES
                archive.writestr(f"{name}.head", raw[:start])
                archive.writestr(f"{name}.webp", to_webp(raw[start:end]), zipfile.ZIP_STORED)
                archive.writestr(f"{name}.tail", raw[end:])
    return [packs / part for part in PARTS]


def unpack(packs: Path, data: Path) -> None:
    """Write the official files below a data folder, from both parts; what they hold is verified when it is read."""
    folder = data / CIFAR10_FILES.folder
    folder.mkdir(parents=True, exist_ok=True)
    for part, names in PARTS.items():
        with zipfile.ZipFile(packs / part) as archive:
            members = set(archive.namelist())
            for name in names:
                if name in members:
                    raw = archive.read(name)
                else:
                    head, webp, tail = (archive.read(f"{name}.{kind}") for kind in ("head", "webp", "tail"))
                    raw = head + from_webp(webp) + tail
                (folder / name).write_bytes(raw)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    if options.action == "unpack":
        unpack(options.source, options.target)
        return
    for path in pack(options.source, options.target):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
