"""Data sets of small labeled images, held entirely on the device as uint8, and their batches.

Images are stored as (N, H, W, C), so that a batch permuted to (N, C, H, W) is channels_last, the fastest memory format
for convolutions. There are no worker processes: a batch is one gather.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.data.datasets import DatasetSize, DatasetSource
from cvlab.data.digest import DataDigest
from cvlab.data.rng import hashes, permutation
from cvlab.distributed import sharding
from cvlab.engine import device as engine_device
from cvlab.engine import memory
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.classification.data.augment import Augmentation
from cvlab.ops.resample import EvalTransform

EVAL_BATCH_SIZE = 500
MAX_SHARE_OF_MEMORY = 0.5  # of a GPU, for images
EVAL_BATCH_PIXELS = EVAL_BATCH_SIZE * 32 * 32


class ImageRows:
    """Some rows of a tensor that may be larger than memory: a gather that is done where rows are asked for.

    Args:
        pixels: uint8 (N, H, W, C).
        index: int64 (M,): which rows of `pixels`, in which order.
        digests: What the content of each of the M rows is known by, so that it need not be read for that.
        device: Where the rows that are asked for go; None for where they are.
    """

    def __init__(
        self, pixels: Tensor, index: Tensor, digests: tuple[str, ...], device: torch.device | None = None
    ) -> None:
        self.pixels, self.index, self.digests = pixels, index, digests
        self.shape = torch.Size((len(index), *pixels.shape[1:]))
        self.dtype, self.device, self.ndim = pixels.dtype, device or pixels.device, pixels.ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> "Tensor":
        chosen = self.index[rows.to(self.index.device) if isinstance(rows, Tensor) else rows]
        return engine_device.upload(self.pixels[chosen], self.device)

    def rows(self, selection: slice) -> "ImageRows":
        """Return a part of the rows, without reading them."""
        return ImageRows(self.pixels, self.index[selection], self.digests[selection], self.device)

    def to(self, device: torch.device) -> "Images":
        """Return the rows on a device: all of them, or if they would take most of its memory, those that are asked for.

        Where they are already there, none is read.
        """
        if device == self.device:
            return self
        free = memory.free_bytes(device)
        if free is None or math.prod(self.shape) <= MAX_SHARE_OF_MEMORY * free:
            return self[:].to(device)
        return ImageRows(self.pixels, self.index, self.digests, device)


class TransformedImages:
    """Images of another size, each resized and cropped as a photo would be where it is asked for.

    Args:
        images: uint8 (N, H, W, C), in grayscale or RGB.
        transform: How an image becomes one of `size_px`.
        device: Where the images that are asked for go; None for where they are.
    """

    def __init__(
        self, images: "Tensor | ImageRows", transform: EvalTransform, device: torch.device | None = None
    ) -> None:
        self.images, self.transform = images, transform
        self.shape = torch.Size((len(images), transform.size_px, transform.size_px, 3))
        self.dtype, self.device, self.ndim = images.dtype, device or images.device, images.ndim

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        originals = self.images[rows.to(self.images.device) if isinstance(rows, Tensor) else rows]
        if originals.shape[-1] == 1:
            originals = originals.expand(-1, -1, -1, 3)
        pictures = [np.asarray(self.transform(Image.fromarray(pixels[..., :3].numpy()))) for pixels in originals]
        stacked = np.stack(pictures) if pictures else np.empty((0, *self.shape[1:]), np.uint8)
        return engine_device.upload(torch.from_numpy(stacked), self.device)

    def rows(self, selection: slice) -> "TransformedImages":
        """Return a part of the images, without reading them."""
        return TransformedImages(select_rows(self.images, selection), self.transform, self.device)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "TransformedImages":
        """Return images that go to a device when they are asked for."""
        return TransformedImages(self.images, self.transform, device)


Images = Tensor | ImageRows | TransformedImages


def select_rows(images: Images, selection: slice) -> Images:
    """Return some of the images; those of `ImageRows` are not read."""
    return images[selection] if isinstance(images, Tensor) else images.rows(selection)


def to_image(images: Images, index: int) -> Image.Image:
    """Return one of the images, in grayscale or RGB (alpha is left out), as an RGB picture."""
    array = images[torch.tensor([index])][0].cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3]).convert("RGB")


def add_images(digest: DataDigest, images: Images) -> None:
    """Add images to a digest: their contents, or what these are known by."""
    if isinstance(images, ImageRows):
        digest.add_values([tuple(images.shape), images.digests])
    elif isinstance(images, TransformedImages):
        digest.add_values([images.transform])
        add_images(digest, images.images)
    else:
        digest.add_tensors([images])


@dataclass(frozen=True)
class ImageDataset:
    """Images and labels for classification.

    Attributes:
        name: Name of the data set, for messages.
        train_images: uint8 (N, H, H, C).
        train_labels: int64 (N,), from 0.
        test_images: uint8 (M, H, H, C); M may be 0.
        test_labels: int64 (M,), from 0.
        classes: Names of the classes.
        val_images: uint8 (V, H, H, C) if the data set has a validation split of its own; else None.
        val_labels: int64 (V,), from 0, or None.
        files: Names of the images' files by split, if they have any.
        transform: How a photo becomes one of the images; None: resized to H, then cropped.
        photo_sizes: Width and height of the photos in pixels, with their number, if the images were made from photos.
    """

    name: str
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    classes: tuple[str, ...]
    val_images: Images | None = None
    val_labels: Tensor | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transform: EvalTransform | None = None
    photo_sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def transformed(self, transform: EvalTransform) -> "ImageDataset":
        """Return a data set of the images as a transform makes them."""

        def change(images: Images | None) -> TransformedImages | None:
            return None if images is None else TransformedImages(images, transform)  # type: ignore[arg-type]

        images = {name: change(getattr(self, name)) for name in ("train_images", "val_images", "test_images")}
        return replace(self, transform=transform, **images)  # type: ignore[arg-type]

    def splits(self) -> dict[str, tuple[Images, Tensor]]:
        """Return images and labels by split; `val` and `test` only if the data set has them."""
        pairs = {"train": (self.train_images, self.train_labels), "test": (self.test_images, self.test_labels)}
        if self.val_images is not None and self.val_labels is not None:
            pairs["val"] = (self.val_images, self.val_labels)
        return {name: pair for name, pair in pairs.items() if name == "train" or len(pair[0])}

    def digest(self) -> str:
        """Return a digest of the images and labels of all splits."""
        digest = DataDigest()
        for images, labels in self.splits().values():
            add_images(digest, images)
            digest.add_tensors([labels])
        return digest.hex()

    def photo_transform(self) -> EvalTransform:
        """Return how a photo becomes an image of this data set."""
        side = self.train_images.shape[1]
        return self.transform or EvalTransform(side, side)

    def __post_init__(self) -> None:
        """Check shapes, dtypes and ranges. Raises DataError."""
        for split, (images, labels) in self.splits().items():
            if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
                raise DataError(f"{self.name}: {split} images must be uint8 (N, H, W, C) with as many labels")
            if images.shape[1] != images.shape[2]:
                raise DataError(f"{self.name}: {split} images must be square, are {tuple(images.shape[1:3])}")
            if labels.dtype != torch.int64:
                raise DataError(f"{self.name}: {split} labels must be int64, are {labels.dtype}")
            if len(images) == 0:
                raise DataError(f"{self.name}: there are no {split} images")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise DataError(f"{self.name}: a {split} label lies outside 0..{len(self.classes) - 1}")
            if images.shape[1:] != self.train_images.shape[1:]:
                shapes = [tuple(x.shape[1:]) for x in (self.train_images, images)]
                raise DataError(f"{self.name}: train images are {shapes[0]}, {split} images {shapes[1]} (H, W, C)")
        if len(self.classes) < 2:
            raise DataError(f"{self.name}: one class only", "a classifier needs at least two")


@dataclass(frozen=True, kw_only=True)
class ImageDatasetSource(DatasetSource[ImageDataset]):
    """A data set for classification; `read` reads and verifies it below a root folder."""

    kind = "images"

    read: Callable[[Path], ImageDataset]

    def load(self, root: Path, *args: Any, **options: Any) -> ImageDataset:
        """Read and verify the data set below `root`. Raises DataError."""
        return self.read(root)


@dataclass(frozen=True)
class Normalization:
    """`(x / 255 - mean) / std` per channel, in one multiplication and one addition."""

    scale: Tensor
    shift: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize uint8 (N, C, H, W) into the dtype of the scale, keeping the memory format."""
        return images.to(self.scale.dtype).mul_(self.scale).add_(self.shift)

    def of_pixels(self, images: Tensor) -> Tensor:
        """Normalize images (N, C, H, W) in [0, 1] in float32 or more; differentiable."""
        return images * (255 * self.scale.float()) + self.shift.float()

    def to_pixels(self, images: Tensor) -> Tensor:
        """Return normalized images (N, C, H, W) in [0, 1], as they were before but for rounding."""
        return ((images - self.shift) / (255 * self.scale)).clamp_(0, 1)

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation per channel, of images in [0, 1]."""
        std = 1 / (255 * self.scale.double())
        mean = -self.shift.double() * std
        return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())


def build_normalization(images: Images, kind: str, dtype: torch.dtype, device: torch.device) -> Normalization:
    """Compute the normalization of uint8 images (N, H, W, C).

    Args:
        images: The images whose statistics are taken; the sums of integers are exact, in any order.
        kind: `mean`: subtract the mean of each channel. `mean_std`: also divide by its standard deviation.
        dtype: Type of the normalized images.
        device: Device of the images to normalize.

    Returns:
        The normalization.
    """
    count = math.prod(images.shape[:-1])
    mean = _channel_sums(images, 1) / count / 255
    std = torch.ones_like(mean)
    if kind == "mean_std":
        std = (_channel_sums(images, 2) / count / 255**2 - mean.square()).clamp(min=0).sqrt()
        std[std < 1e-4] = 1.0  # a constant channel, such as alpha: only subtract its mean
    return normalization(mean, std, dtype, device)


def normalization(
    mean: Tensor | Sequence[float], std: Tensor | Sequence[float], dtype: torch.dtype, device: torch.device
) -> Normalization:
    """Return the normalization that subtracts a mean and divides by a standard deviation per channel."""
    mean, std = torch.as_tensor(mean), torch.as_tensor(std)
    scale, shift = 1 / (255 * std), -mean / std
    return Normalization(scale.to(device, dtype).view(1, -1, 1, 1), shift.to(device, dtype).view(1, -1, 1, 1))


def _channel_sums(images: Images, power: int) -> Tensor:
    """Return the sums of x^power over all pixels of each channel, float64 (C,)."""
    total = torch.zeros(math.prod(images.shape[1:]), dtype=torch.float64)
    for start in range(0, len(images), 256):  # 256 * 255^2 < 2^24: exact in float32, which is fast to sum
        total += images[start : start + 256].flatten(1).float().pow_(power).sum(0)
    return total.view(-1, images.shape[-1]).sum(0)


class TrainLoader:
    """The batch of every step as a pure function of (seed, step): shuffled epochs without the last partial batch."""

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        batch_size: int,
        seed: int,
        normalize: Normalization,
        augment: Augmentation | None = None,
    ) -> None:
        """Take uint8 images (N, H, W, C) and labels (N,) on one device. Raises ConfigError if batch_size > N."""
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.normalize, self.augment = normalize, augment or Augmentation()
        self.steps_per_epoch = count_steps_per_epoch(len(images), batch_size)
        self.num_classes = int(labels.max()) + 1  # of the targets of mixtures
        self.sampling = "shuffle"  # or balanced
        self.extra_state: dict[str, Tensor] = {}
        self._order: tuple[int, Tensor] = (-1, labels)  # epoch, indices

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and its index within the epoch."""
        return divmod(step, self.steps_per_epoch)

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the indices of the images of an epoch, in the order in which they are seen."""
        order = permutation(self.seed, epoch, len(self.images), self.images.device)
        return balanced_order(self.labels, self.seed, epoch)[order] if self.sampling == "balanced" else order

    def batch_indices(self, step: int) -> Tensor:
        """Return the indices of the images of a step: int64 (batch_size,)."""
        epoch, index = self.locate(step)
        if self._order[0] != epoch:
            self._order = (epoch, self.epoch_order(epoch))
        return self._order[1][index * self.batch_size : (index + 1) * self.batch_size]

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's shard of the batch of a step: normalized images (N, C, H, W) and labels (N,).

        Of a mixture the labels are probabilities of classes (N, K). Each image is mixed with the one before it in the
        whole batch, so the mixtures do not depend on the number of ranks.
        """
        epoch, _ = self.locate(step)
        batch = self.batch_indices(step)
        if not self.augment.has_mixtures:
            return self._load(sharding.shard(batch), epoch)
        first, end = sharding.shard_range(len(batch))
        extended = torch.cat([batch[-1:], batch])[first : end + 1]  # with the one before the first of the shard
        images, labels = self._load(extended, epoch)
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        return self.augment.mix(images, targets, self.seed, step)

    def _load(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        images = self.normalize(self.augment(self.images[indices], indices, self.seed, epoch).permute(0, 3, 1, 2))
        return self.augment.cutout(images, indices, self.seed, epoch), self.labels[indices]


def default_eval_batch_size(images: Images, train_batch_size: int = 1) -> int:
    """Return how many images are evaluated at a time: 500 up to 32x32 px, of larger ones as many as have those pixels.

    Args:
        images: (N, H, W, C).
        train_batch_size: Batch size of all ranks in training, a rank's share of which is the minimum: it fits into
            memory even with gradients.
    """
    _, height, width, _ = images.shape
    first, end = sharding.shard_range(train_batch_size)
    return min(EVAL_BATCH_SIZE, max(EVAL_BATCH_PIXELS // (height * width), end - first, 1))


def balanced_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Return which images an epoch with equally frequent classes consists of, ordered by class.

    From epoch to epoch each class continues through its images in random order, each pass in another, so that all
    images of a class are seen equally often.

    Args:
        labels: int64 (N,).
        seed: Seed of the run.
        epoch: The epoch, from 0.

    Returns:
        Indices of images, int64 (N,). The numbers of images of the classes that occur differ by at most 1.
    """
    count, classes = len(labels), labels.unique()
    chosen = []
    for position, label in enumerate(classes.tolist()):
        images = (labels == label).nonzero().flatten()
        # of the slots 0, 1, ... of all epochs, those that leave the remainder `position` belong to the class
        start, end = (-((position - slot) // len(classes)) for slot in (epoch * count, (epoch + 1) * count))
        uses = torch.arange(start, end, device=labels.device)
        first_pass, last_pass = start // len(images), max(start, end - 1) // len(images)
        passes = torch.arange(first_pass, last_pass + 1, device=labels.device)
        numbers = passes[:, None] * len(images) + torch.arange(len(images), device=labels.device)  # (passes, images)
        order = torch.argsort(hashes(seed, label, numbers, "balanced"), dim=1, stable=True)
        chosen.append(images[order.flatten()[uses - first_pass * len(images)]])
    return torch.cat(chosen)


def eval_batches(
    images: Images, labels: Tensor, normalize: Normalization, batch_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's shard of all images once, in order: normalized images (N, C, H, W) and labels (N,).

    `batch_size` is by default `default_eval_batch_size`.
    """
    size = batch_size or default_eval_batch_size(images)
    first, end = sharding.shard_range(len(images))
    for start in range(first, end, size):
        stop = min(start + size, end)
        yield normalize(images[start:stop].permute(0, 3, 1, 2)), labels[start:stop]


def dataset_size(dataset: ImageDataset) -> DatasetSize:
    """Return the size of a data set."""
    count, height, _, channels = dataset.train_images.shape
    return DatasetSize(count, len(dataset.test_images), height, channels, len(dataset.classes))


def split_sizes(count: int, val_fraction: float, num_train: int | None) -> tuple[int, int]:
    """Return the numbers of training and validation images of a data set with `count` training images.

    Args:
        count: Number of images in the data set's training split.
        val_fraction: Fraction of them that becomes the validation split; 0 for no validation split.
        num_train: Number of images to train on; None for all that remain.

    Returns:
        Number of training images, number of validation images.

    Raises:
        ConfigError: One of the two splits would be empty, or fewer than `num_train` remain.
    """
    num_val = round(count * val_fraction)
    available = count - num_val
    num_train = available if num_train is None else num_train
    if num_train > available or available == 0 or (num_val == 0 and val_fraction > 0):
        raise ConfigError(
            f"data.num_train {num_train}, data.val_fraction {val_fraction:g}: {count} training images leave "
            f"{available} to train on and {num_val} to validate",
            f"at most num_train={available}" if num_train > available else "raise data.val_fraction",
        )
    return num_train, num_val


def split(dataset: ImageDataset, val_fraction: float, num_train: int | None) -> dict[str, tuple[Images, Tensor]]:
    """Split a data set into `train`, `val` (unless `val_fraction` is 0) and `test` (if present): images and labels.

    Without a validation split of its own, the last `val_fraction` of the training images is `val`. The first
    `num_train` of the rest are `train`.
    """
    splits = dataset.splits()
    x, y = splits.pop("train")
    if "val" in splits:
        num_train, _ = split_sizes(len(x), 0.0, num_train)
    else:
        num_train, num_val = split_sizes(len(x), val_fraction, num_train)
        if num_val:
            splits["val"] = (select_rows(x, slice(len(x) - num_val, None)), y[-num_val:])
    train = (select_rows(x, slice(num_train)), y[:num_train])
    return {"train": train, **{name: splits[name] for name in ("val", "test") if name in splits}}


def count_steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of full batches. Raises ConfigError if there is none."""
    if batch_size > num_images:
        raise ConfigError(
            f"batch_size {batch_size} is larger than the training set of {num_images} images",
            "lower batch_size or raise data.num_train",
        )
    return num_images // batch_size
