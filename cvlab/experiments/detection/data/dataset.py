"""Detection data sets: what the readers return, checked against the images and made into tensors.

Boxes that reach beyond their image are clipped, boxes wholly outside raise DataError, boxes without area are dropped
and counted.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cvlab import console, registry
from cvlab.data import datasets, photos, rng
from cvlab.data.datasets import DatasetSource
from cvlab.data.digest import DataDigest
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import SPLITS, AnnotationSet, ImageAnnotation, ObjectAnnotation

SPLIT_SEED = 0  # of the images that become `val`
TOLERANCE_PX = 0.02  # beyond an edge, from rounded fractions


@dataclass(frozen=True)
class DetectionSample:
    """One image and its boxes.

    Attributes:
        path: The image file.
        boxes_xyxy: float32 (N, 4), in pixels of the image as `photos.load` returns it, from 0, right and bottom edges
            exclusive.
        labels: int64 (N,), indices into the classes.
        difficult: bool (N,): not used in training, ignored in evaluation.
        confidence: (N,), in [0, 1], of pseudo-labels; None for boxes drawn by people.
        crowd: bool (N,): around many objects, also difficult; None if there is no such box.
    """

    path: Path
    boxes_xyxy: Tensor
    labels: Tensor
    difficult: Tensor
    confidence: Tensor | None = None
    crowd: Tensor | None = None

    @property
    def has_boxes(self) -> bool:
        """Whether there is a box that an evaluation counts."""
        return not bool(self.difficult.all())


@dataclass(frozen=True)
class DetectionDataset:
    """A detection data set; `splits` has `train`, `val` and `test`, of which the last two may be empty."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[DetectionSample, ...]]

    def digest(self) -> str:
        """Return the digest of all photos and boxes."""
        digest = DataDigest().add_values([self.classes])
        for split, samples in self.splits.items():
            digest.add_values([split]).add_files(sample.path for sample in samples)
            for sample in samples:
                digest.add_tensors((sample.boxes_xyxy, sample.labels, sample.difficult))
        return digest.hex()

    def load(self, sample: DetectionSample) -> Image.Image:
        """Decode an image."""
        return photos.load(sample.path)


@dataclass(frozen=True, kw_only=True)
class DetectionDatasetSource(DatasetSource[DetectionDataset]):
    """A detection data set of the table."""

    kind = "boxes"

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
        """Read the data set.

        Args:
            root: The folder below which data sets lie.
            path: Folder or file of the user's own data set; None for all others.
            val_fraction: If the data set has no validation list, this fraction of its training images, the last in a
                fixed random order, becomes `val`.

        Raises:
            DataError: if a file is missing or broken.
            ConfigError: if `path` is missing, or given to a data set that takes none.
        """
        raise NotImplementedError

    def reject_path(self, path: str | None) -> None:
        """Raise ConfigError if there is a path, which only the user's own data set takes."""
        if path is not None:
            raise ConfigError(f"data {self.name}: path requires name: {self.kind}")


@dataclass(frozen=True, kw_only=True)
class AnnotatedSource(DetectionDatasetSource):
    """A data set whose annotation files `read` reads from below the root folder."""

    read: Callable[[Path], AnnotationSet]

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
        """Read the data set; see `DetectionDatasetSource.load`."""
        self.reject_path(path)
        return from_annotations(self.name, self.read(root), val_fraction)


def load(name: str, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
    """Read the data set called `name`; see `DetectionDatasetSource.load`. ConfigError for an unknown name."""
    return datasets.get_of_kind(name, DetectionDatasetSource).load(root, path, val_fraction)


def summarize(dataset: DetectionDataset) -> str:
    """Describe a data set that was read whole in one line."""
    samples = [sample for split in dataset.splits.values() for sample in split]
    num_boxes = sum(len(sample.labels) for sample in samples)
    num_classes = len(dataset.classes)
    return f"{len(samples)} photos, {num_boxes} boxes, {num_classes} classes, every annotation can be read"


def from_annotations(
    name: str, annotation_set: AnnotationSet, val_fraction: float, warn: bool = True
) -> DetectionDataset:
    """Check annotations against their images, and split off `val` if it is missing.

    If the annotation files do not list the classes, these are the names of all objects, sorted.
    """
    classes = annotation_set.classes
    if classes is None:
        images = (image for split in annotation_set.splits.values() for image in split)
        classes = tuple(sorted({obj.name for image in images for obj in image.objects}))
    index = {known: k for k, known in enumerate(classes)}
    if len(index) < len(classes):
        duplicate = next(known for known in classes if classes.count(known) > 1)
        raise DataError(f"{name}: the class {duplicate!r} is named twice", "rename one of the two")
    irregularities = _Irregularities()
    splits = {
        split: tuple(_to_sample(image, index, irregularities) for image in annotation_set.splits.get(split, ()))
        for split in SPLITS
    }
    if warn:
        irregularities.report(name)
    if not splits["train"]:
        counts = ", ".join(f"{len(samples)} photos in {split}" for split, samples in splits.items())
        raise DataError(f"{name}: no photos to train on", f"the {annotation_set.format} layout has {counts}")
    if not index:
        raise DataError(f"{name}: no object in any photo", "a detector needs some to train on")
    if not splits["val"] and val_fraction > 0:
        splits["train"], splits["val"] = _split_off_val(splits["train"], val_fraction)
    return DetectionDataset(name, classes, splits)


@dataclass
class _Irregularities:
    """The files in which something was irregular, one entry for each box or image."""

    without_area: list[Path] = field(default_factory=list)
    clipped: list[Path] = field(default_factory=list)
    other_size: list[Path] = field(default_factory=list)

    def report(self, name: str) -> None:
        """Log one line for each kind of irregularity."""
        if self.without_area:
            _warn_once(f"{name}: boxes without area left out: {_count(self.without_area)}")
        if self.other_size:
            problem = "photos of another size than their annotation claims"
            _warn_once(f"{name}: {problem}, boxes taken as they are: {_count(self.other_size)}")
        if self.clipped:
            console.debug(f"{name}: boxes clipped at the edge of their photo: {_count(self.clipped)}")


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning the first time only: a plan and its run read the same annotations."""
    console.info(f"warning: {text}")


def _count(files: list[Path]) -> str:
    return f"{len(files)}, the first in {files[0]}"


def _split_off_val(
    train: tuple[DetectionSample, ...], fraction: float
) -> tuple[tuple[DetectionSample, ...], tuple[DetectionSample, ...]]:
    """Return the samples that remain for training and those for validation; both have boxes if two samples have."""
    order = rng.permutation(SPLIT_SEED, 0, len(train), torch.device("cpu")).tolist()
    num_val = min(len(train) - 1, max(1, round(len(train) * fraction)))
    shuffled = [train[k] for k in order]
    num_train = len(train) - num_val
    with_boxes = [k for k, sample in enumerate(shuffled) if sample.has_boxes]
    in_train = [k for k in with_boxes if k < num_train]
    if len(with_boxes) > 1 and len(in_train) in (0, len(with_boxes)):
        first, last = with_boxes[0], with_boxes[-1]
        a, b = (last, len(train) - 1) if in_train else (first, 0)
        shuffled[a], shuffled[b] = shuffled[b], shuffled[a]
    return tuple(shuffled[:num_train]), tuple(shuffled[num_train:])


def _to_sample(image: ImageAnnotation, index: dict[str, int], irregularities: _Irregularities) -> DetectionSample:
    """Make tensors of one image's boxes, rotated as its EXIF orientation says, clipped, without empty ones."""
    header = annotations.read_header(image.image)
    stored = (header.width, header.height)
    is_quarter_turn = header.orientation >= 5
    displayed = stored[::-1] if is_quarter_turn else stored
    # If the annotation claims the stored size, its boxes were drawn on the unrotated pixels.
    rotate = is_quarter_turn and image.size == stored and stored != displayed
    if image.size not in (None, stored, displayed):
        irregularities.other_size.append(image.file)
    width, height = stored if rotate else displayed
    boxes, labels, difficult, crowd = [], [], [], []
    for obj in image.objects:
        box = _clip_box(obj, image, (width, height), irregularities)
        if box is None:
            continue
        boxes.append(box)
        labels.append(_label_of(obj, index))
        difficult.append(obj.difficult)
        crowd.append(obj.crowd)
    boxes_xyxy = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    if rotate:
        boxes_xyxy = apply_orientation(boxes_xyxy, header.orientation, stored)
    return DetectionSample(
        image.image,
        boxes_xyxy,
        torch.tensor(labels).long(),
        torch.tensor(difficult).bool(),
        crowd=torch.tensor(crowd).bool() if any(crowd) else None,
    )


def _label_of(obj: ObjectAnnotation, index: dict[str, int]) -> int:
    """Return the index of an object's class."""
    if obj.name not in index:
        error = registry.unknown_name_error("class", obj.name, index)
        raise DataError(f"{obj.location}: {error.message}", error.hint)
    return index[obj.name]


def _clip_box(
    obj: ObjectAnnotation, image: ImageAnnotation, size: tuple[int, int], irregularities: _Irregularities
) -> annotations.Box | None:
    """Return a box in pixels, clipped to its image of `size` (width, height); None if it has no area."""
    width, height = size
    scale_x, scale_y = size if image.relative else (1, 1)
    x1, x2 = obj.box_xyxy[0] * scale_x, obj.box_xyxy[2] * scale_x
    y1, y2 = obj.box_xyxy[1] * scale_y, obj.box_xyxy[3] * scale_y
    if x2 <= x1 or y2 <= y1:
        irregularities.without_area.append(image.file)
        return None
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        problem = f"the box {x1:g} {y1:g} {x2:g} {y2:g} lies outside the photo of {width} x {height} px"
        raise DataError(f"{obj.location}: {problem}", "correct or remove it")
    if min(x1, y1) < -TOLERANCE_PX or x2 > width + TOLERANCE_PX or y2 > height + TOLERANCE_PX:
        irregularities.clipped.append(image.file)
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def apply_orientation(boxes_xyxy: Tensor, orientation: int, size: tuple[int, int]) -> Tensor:
    """Map boxes (N, 4) of an image of `size` (width, height) as its EXIF orientation, 1 to 8, maps its pixels."""
    width, height = size
    x, y = boxes_xyxy[:, 0::2], boxes_xyxy[:, 1::2]
    if orientation in (2, 3, 7, 8):
        x = width - x
    if orientation in (3, 4, 6, 7):
        y = height - y
    if orientation >= 5:
        x, y = y, x
    return torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)
