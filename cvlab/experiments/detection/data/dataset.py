"""Detection data sets: what the readers return, checked against the images and made into tensors.

Boxes that reach beyond their image are clipped. Boxes wholly outside or without area, repeated boxes and photos that
cannot be read are left out, and reported with what the reader has left out: how many, and where the first ones are.
"""

import dataclasses
import functools
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from cvlab.experiments.detection.data.annotations import (
    SPLITS,
    AnnotationSet,
    ImageAnnotation,
    ImageHeader,
    Irregularities,
    ObjectAnnotation,
)

SPLIT_SEED = 0  # of the images that become `val`
TOLERANCE_PX = 0.02  # beyond an edge, or between two boxes that are the same, from rounded fractions
CLIPPED = "boxes clipped at the edge of their photo"


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
    irregularities = annotation_set.irregularities
    spelling = _class_spellings(name, annotation_set)
    listed = annotation_set.classes
    classes = tuple(dict.fromkeys(spelling[known] for known in listed or sorted(set(spelling.values()))))
    index = {written: classes.index(known) for written, known in spelling.items() if known in classes}
    for obj in (obj for images in annotation_set.splits.values() for image in images for obj in image.objects):
        if obj.name != spelling[obj.name]:
            irregularities.add(f"objects of class {obj.name!r} counted as {spelling[obj.name]!r}", obj.location)
    splits = {split: _to_samples(annotation_set.splits.get(split, []), index, irregularities) for split in SPLITS}
    if not splits["train"]:
        counts = ", ".join(f"{len(samples)} photos in {split}" for split, samples in splits.items())
        hint = "; ".join([f"the {annotation_set.format} layout has {counts}", *irregularities.lines()])
        raise DataError(f"{name}: no photos to train on", hint)
    if not any(len(sample.labels) for samples in splits.values() for sample in samples):
        hint = "; ".join(["a detector needs some to train on", *irregularities.lines()])
        raise DataError(f"{name}: no object in any photo", hint)
    if not splits["val"] and val_fraction > 0:
        splits["train"], splits["val"] = _split_off_val(splits["train"], val_fraction)
    _report_shared_photos(splits, irregularities)
    if warn:
        for line in irregularities.lines():
            if line.startswith(CLIPPED):
                console.debug(f"{name}: {line}")
            else:
                _warn_once(f"{name}: {line}")
    return DetectionDataset(name, classes, splits)


def _class_spellings(name: str, annotation_set: AnnotationSet) -> dict[str, str]:
    """Return the class that each name in the files stands for: one for names that differ in capitals or spaces.

    It is the spelling in the list of classes if one is there, else the most frequent one. Single letters differ in
    capitals. DataError if the list has a name twice.
    """
    objects = (obj for images in annotation_set.splits.values() for image in images for obj in image.objects)
    counts = Counter(obj.name for obj in objects)
    listed = annotation_set.classes or ()
    plain_listed = [_plain(known) for known in listed]
    duplicate = next((known for known in plain_listed if plain_listed.count(known) > 1), None)
    if duplicate is not None and annotation_set.format != "COCO":
        raise DataError(f"{name}: the class {duplicate!r} is named twice", "rename one of the two")
    groups: dict[str, list[str]] = {}
    for written in dict.fromkeys([*listed, *sorted(counts)]):
        plain = _plain(written)
        groups.setdefault(plain.casefold() if len(plain) > 1 else plain, []).append(written)
    spelling: dict[str, str] = {}
    for group in groups.values():
        candidates = [written for written in group if written in listed] or group
        total = Counter[str]()
        for written in candidates:
            total[_plain(written)] += counts[written]
        known = max(total, key=lambda plain: total[plain])
        spelling |= dict.fromkeys(group, known)
    return spelling


def _plain(name: str) -> str:
    """Return a class name in composed characters, with single spaces between its words and none around it."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _report_shared_photos(splits: dict[str, tuple[DetectionSample, ...]], irregularities: Irregularities) -> None:
    """Report the photos that are in more than one split, under the same or another name."""
    by_size: dict[int, list[tuple[str, Path]]] = {}
    for split, samples in splits.items():
        for path in dict.fromkeys(sample.path for sample in samples):
            by_size.setdefault(path.stat().st_size, []).append((split, path))
    for photos_of_size in by_size.values():
        if len({split for split, _ in photos_of_size}) == 1:
            continue
        first: dict[bytes, str] = {}
        for split, path in photos_of_size:
            digest = hashlib.blake2b(path.read_bytes()).digest()
            if first.setdefault(digest, split) != split:
                irregularities.add(f"photos of {split} that are in {first[digest]} too", path)


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning the first time only: a plan and its run read the same annotations."""
    console.info(f"warning: {text}")


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


def _to_samples(
    images: Sequence[ImageAnnotation], index: dict[str, int], irregularities: Irregularities
) -> tuple[DetectionSample, ...]:
    """Make samples of the images of a split; the annotations of one photo become one sample."""
    by_path: dict[Path, ImageAnnotation] = {}
    for image in images:
        if image.image in by_path:
            irregularities.add("photos with several annotations, which were joined", image.image)
            image = dataclasses.replace(image, objects=by_path[image.image].objects + image.objects)
        by_path[image.image] = image
    samples = []
    for image in by_path.values():
        try:
            header = annotations.read_header(image.image)
        except DataError as error:
            irregularities.add("photos that cannot be read left out", error.message)
            continue
        samples.append(_to_sample(image, header, index, irregularities))
    return tuple(samples)


def _to_sample(
    image: ImageAnnotation, header: ImageHeader, index: dict[str, int], irregularities: Irregularities
) -> DetectionSample:
    """Make tensors of one image's boxes, rotated as its EXIF orientation says, clipped, without empty ones."""
    stored = (header.width, header.height)
    is_quarter_turn = header.orientation >= 5
    displayed = stored[::-1] if is_quarter_turn else stored
    # If the annotation claims the stored size, its boxes were drawn on the unrotated pixels.
    rotate = is_quarter_turn and image.size == stored and stored != displayed
    if image.size not in (None, stored, displayed):
        kind = "photos of another size than their annotation claims, boxes taken as they are"
        irregularities.add(kind, image.image)
    boxed = _unique_boxes(image, stored if rotate else displayed, index, irregularities)
    boxes_xyxy = torch.tensor([box for _, box in boxed], dtype=torch.float32).view(-1, 4)
    if rotate:
        boxes_xyxy = apply_orientation(boxes_xyxy, header.orientation, stored)
    crowd = torch.tensor([obj.crowd for obj in boxed.values()]).bool()
    return DetectionSample(
        image.image,
        boxes_xyxy,
        torch.tensor([label for label, _ in boxed]).long(),
        torch.tensor([obj.difficult for obj in boxed.values()]).bool(),
        crowd=crowd if crowd.any() else None,
    )


def _unique_boxes(
    image: ImageAnnotation, size: tuple[int, int], index: dict[str, int], irregularities: Irregularities
) -> dict[tuple[int, annotations.Box], ObjectAnnotation]:
    """Return the objects of an image of `size` (width, height) by label and box in pixels, each of them once."""
    boxed: dict[tuple[int, annotations.Box], ObjectAnnotation] = {}
    nearby: dict[tuple[int, int], list[annotations.Box]] = {}  # boxes by label and left edge in whole pixels
    for obj in image.objects:
        box = _clip_box(obj, image, size, irregularities)
        if box is None:
            continue
        label, left = _label_of(obj, index), int(box[0])
        candidates = (other for x in (left - 1, left, left + 1) for other in nearby.get((label, x), ()))
        key = (label, next((other for other in candidates if _is_same_box(other, box)), box))
        if key in boxed:
            irregularities.add("repeated boxes read once", obj.location)
        else:
            nearby.setdefault((label, left), []).append(box)
        if key not in boxed or boxed[key].difficult:
            boxed[key] = obj
    return boxed


def _is_same_box(one: annotations.Box, other: annotations.Box) -> bool:
    return all(abs(a - b) <= TOLERANCE_PX for a, b in zip(one, other, strict=True))


def _label_of(obj: ObjectAnnotation, index: dict[str, int]) -> int:
    """Return the index of an object's class."""
    if obj.name not in index:
        error = registry.unknown_name_error("class", obj.name, index)
        raise DataError(f"{obj.location}: {error.message}", error.hint)
    return index[obj.name]


def _clip_box(
    obj: ObjectAnnotation, image: ImageAnnotation, size: tuple[int, int], irregularities: Irregularities
) -> annotations.Box | None:
    """Return a box in pixels, clipped to its image of `size` (width, height); None if it has no area there."""
    width, height = size
    scale_x, scale_y = size if image.relative else (1, 1)
    x1, x2 = obj.box_xyxy[0] * scale_x, obj.box_xyxy[2] * scale_x
    y1, y2 = obj.box_xyxy[1] * scale_y, obj.box_xyxy[3] * scale_y
    if x2 <= x1 or y2 <= y1:
        irregularities.add("boxes without area left out", obj.location)
        return None
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        irregularities.add("boxes outside their photo left out", obj.location)
        return None
    if min(x1, y1) < -TOLERANCE_PX or x2 > width + TOLERANCE_PX or y2 > height + TOLERANCE_PX:
        irregularities.add("boxes clipped at the edge of their photo", obj.location)
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
