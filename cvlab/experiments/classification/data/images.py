"""Data sets of small labeled images, held entirely on the device as uint8, and their batches.

Images are stored as (N, H, W, C), so that a batch permuted to (N, C, H, W) is channels_last, the fastest memory format
for convolutions. There are no worker processes: a batch is one gather.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cvlab.data.datasets import DatasetSize, DatasetSource
from cvlab.data.rng import permutation
from cvlab.distributed import sharding
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.classification.data.augment import Augmentation

EVAL_BATCH_SIZE = 500


@dataclass(frozen=True)
class ImageDataset:
    """Images and labels for classification.

    Attributes:
        name: Name of the data set, for messages.
        train_images: uint8 (N, H, H, C).
        train_labels: int64 (N,), from 0.
        test_images: uint8 (M, H, H, C).
        test_labels: int64 (M,), from 0.
        classes: Names of the classes.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the images and labels of both splits."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels

    def __post_init__(self) -> None:
        """Check shapes, dtypes and ranges. Raises DataError."""
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
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
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            shapes = [tuple(images.shape[1:]) for images in (self.train_images, self.test_images)]
            raise DataError(f"{self.name}: train images are {shapes[0]}, test images {shapes[1]} (H, W, C)")
        if len(self.classes) < 2:
            raise DataError(f"{self.name}: one class only", "a classifier needs at least two")


@dataclass(frozen=True, kw_only=True)
class ImageDatasetSource(DatasetSource[ImageDataset]):
    """A data set for classification; `read` reads and verifies it below a root folder."""

    kind = "images"

    read: Callable[[Path], ImageDataset]

    def load(self, root: Path) -> ImageDataset:
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

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation per channel, of images in [0, 1]."""
        std = 1 / (255 * self.scale.double())
        mean = -self.shift.double() * std
        return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())


def build_normalization(images: Tensor, kind: str, dtype: torch.dtype, device: torch.device) -> Normalization:
    """Compute the normalization of uint8 images (N, H, W, C).

    Args:
        images: The images whose statistics are taken; the sums of integers are exact, in any order.
        kind: `mean`: subtract the mean of each channel. `mean_std`: also divide by its standard deviation.
        dtype: Type of the normalized images.
        device: Device of the images to normalize.

    Returns:
        The normalization.
    """
    channels = images.shape[-1]
    count = images.numel() // channels
    mean = _channel_sums(images, 1) / count / 255
    std = torch.ones_like(mean)
    if kind == "mean_std":
        std = (_channel_sums(images, 2) / count / 255**2 - mean.square()).clamp(min=0).sqrt()
        std[std < 1e-4] = 1.0  # a constant channel, such as alpha: only subtract its mean
    scale, shift = 1 / (255 * std), -mean / std
    return Normalization(scale.to(device, dtype).view(1, -1, 1, 1), shift.to(device, dtype).view(1, -1, 1, 1))


def _channel_sums(images: Tensor, power: int) -> Tensor:
    """Return the sums of x^power over all pixels of each channel, float64 (C,)."""
    total = torch.zeros(images[0].numel(), dtype=torch.float64)
    for chunk in images.flatten(1).split(256):  # 256 * 255^2 < 2^24: exact in float32, which is fast to sum
        total += chunk.float().pow_(power).sum(0)
    return total.view(-1, images.shape[-1]).sum(0)


class TrainLoader:
    """The batch of every step as a pure function of (seed, step): shuffled epochs without the last partial batch."""

    def __init__(
        self,
        images: Tensor,
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
        self.extra_state: dict[str, Tensor] = {}
        self._order: tuple[int, Tensor] = (-1, labels)  # epoch, indices

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and its index within the epoch."""
        return divmod(step, self.steps_per_epoch)

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the indices of the images of an epoch, in the order in which they are seen."""
        return permutation(self.seed, epoch, len(self.images), self.images.device)

    def batch_indices(self, step: int) -> Tensor:
        """Return the indices of the images of a step: int64 (batch_size,)."""
        epoch, index = self.locate(step)
        if self._order[0] != epoch:
            self._order = (epoch, self.epoch_order(epoch))
        return self._order[1][index * self.batch_size : (index + 1) * self.batch_size]

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's shard of the batch of a step: normalized images (N, C, H, W) and labels (N,)."""
        indices = sharding.shard(self.batch_indices(step))
        epoch, _ = self.locate(step)
        images = self.normalize(self.augment(self.images[indices], indices, self.seed, epoch).permute(0, 3, 1, 2))
        return self.augment.cutout(images, indices, self.seed, epoch), self.labels[indices]


def eval_batches(images: Tensor, labels: Tensor, normalize: Normalization) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's shard of all images once, in order: normalized images (N, C, H, W) and labels (N,)."""
    first, end = sharding.shard_range(len(images))
    for start in range(first, end, EVAL_BATCH_SIZE):
        stop = min(start + EVAL_BATCH_SIZE, end)
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
        ConfigError: If one of the two splits would be empty, or fewer than `num_train` remain.
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


def split(dataset: ImageDataset, val_fraction: float, num_train: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Split a data set into `train`, `val` (unless `val_fraction` is 0) and `test`: images and labels.

    The last `val_fraction` of the training images is `val`, the first `num_train` of the rest are `train`.
    """
    num_train, num_val = split_sizes(len(dataset.train_images), val_fraction, num_train)
    x, y = dataset.train_images, dataset.train_labels
    val = {"val": (x[-num_val:], y[-num_val:])} if num_val else {}
    return {"train": (x[:num_train], y[:num_train]), **val, "test": (dataset.test_images, dataset.test_labels)}


def count_steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of full batches. Raises ConfigError if there is none."""
    if batch_size > num_images:
        raise ConfigError(
            f"batch_size {batch_size} is larger than the training set of {num_images} images",
            "lower batch_size or raise data.num_train",
        )
    return num_images // batch_size
