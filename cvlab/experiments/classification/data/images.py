"""Sets of small labelled images, held whole on the device as uint8, and batches of them.

Images lie as (N, H, W, C), so that a batch permuted to (N, C, H, W) is channels_last, which convolutions compute
fastest. There are no worker processes: a batch is one gather.
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

EVAL_BATCH = 500


@dataclass(frozen=True)
class ImageDataset:
    """Images and labels of one data set.

    `train_images`, `test_images`: uint8 (N, H, W, C); `train_labels`, `test_labels`: int64 (N,), from 0.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse what no training could use. DataError says what is wrong."""
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
        if len(self.classes) < 2:
            raise DataError(f"{self.name}: one class only", "a classifier needs at least two")


@dataclass(frozen=True, kw_only=True)
class ImageDatasetSource(DatasetSource[ImageDataset]):
    """A data set for classification; `read` reads and verifies it below a root folder."""

    kind = "images"
    contents = "images with a class each"

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
        """Map uint8 (N, C, H, W) to the scale's dtype, keeping the memory format."""
        return images.to(self.scale.dtype).mul_(self.scale).add_(self.shift)

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return both per channel, of images in [0, 1]."""
        std = 1 / (255 * self.scale.double())
        mean = -self.shift.double() * std
        return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())


def normalization(images: Tensor, kind: str, dtype: torch.dtype, device: torch.device) -> Normalization:
    """Build the normalisation of `images` (N, H, W, C) uint8: `mean` subtracts it, `mean_std` divides by the deviation.

    The sums are of whole numbers and exact, whatever the order.
    """
    channels = images.shape[-1]
    count = images.numel() // channels
    mean = _channel_sums(images, 1) / count / 255
    std = torch.ones_like(mean)
    if kind == "mean_std":
        std = (_channel_sums(images, 2) / count / 255**2 - mean.square()).clamp(min=0).sqrt()
        std[std < 1e-4] = 1.0  # a channel that never changes, as full opacity: only its mean is subtracted
    scale, shift = 1 / (255 * std), -mean / std
    return Normalization(scale.to(device, dtype).view(1, -1, 1, 1), shift.to(device, dtype).view(1, -1, 1, 1))


def _channel_sums(images: Tensor, power: int) -> Tensor:
    """Return the sums of x^power over all pixels of each channel, float64 (C,)."""
    total = torch.zeros(images[0].numel(), dtype=torch.float64)
    for chunk in images.flatten(1).split(256):  # 256 * 255^2 < 2^24: exact in float32, which is fast to sum
        total += chunk.float().pow_(power).sum(0)
    return total.view(-1, images.shape[-1]).sum(0)


class TrainLoader:
    """The batch of every step, as a pure function of (seed, step): shuffled epochs, the last partial batch left out."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        normalize: Normalization,
        augment: Augmentation | None = None,
    ) -> None:
        """Take uint8 images (N, H, W, C) and labels (N,) on one device. ConfigError if a batch is larger than N."""
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.normalize, self.augment = normalize, augment or Augmentation()
        self.steps_per_epoch = steps_in_epoch(len(images), batch_size)
        self._order: tuple[int, Tensor] = (-1, labels)

    def place(self, step: int) -> tuple[int, int]:
        """Return in which epoch a step is, and the how manieth of it."""
        return divmod(step, self.steps_per_epoch)

    def order(self, number: int) -> Tensor:
        """Return the order in which an epoch goes through the images."""
        return permutation(self.seed, number, len(self.images), self.images.device)

    def indices(self, step: int) -> Tensor:
        """Return the indices of the images of a step: int64 (batch_size,)."""
        epoch, position = self.place(step)
        if self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the images (N, C, H, W), normalised, and the labels (N,) of a step: this process's share."""
        indices = sharding.shard(self.indices(step))
        epoch, _ = self.place(step)
        images = self.normalize(self.augment(self.images[indices], indices, self.seed, epoch).permute(0, 3, 1, 2))
        return self.augment.cut(images, indices, self.seed, epoch), self.labels[indices]


def eval_batches(images: Tensor, labels: Tensor, normalize: Normalization) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of all images once, in order, normalised, (N, C, H, W) with labels (N,)."""
    first, end = sharding.shard_range(len(images))
    for start in range(first, end, EVAL_BATCH):
        stop = min(start + EVAL_BATCH, end)
        yield normalize(images[start:stop].permute(0, 3, 1, 2)), labels[start:stop]


def size_of(images: ImageDataset) -> DatasetSize:
    """Return how much a set has."""
    count, height, _, channels = images.train_images.shape
    return DatasetSize(count, len(images.test_images), height, channels, len(images.classes))


def split_sizes(count: int, val_fraction: float, num_train: int | None) -> tuple[int, int]:
    """Return how many of `count` images are trained on and how many validate; ConfigError where one is none.

    With a `val_fraction` of 0 all can be trained on and nothing validates.
    """
    num_val = round(count * val_fraction)
    rest = count - num_val
    wanted = rest if num_train is None else num_train
    if wanted > rest or rest == 0 or (num_val == 0 and val_fraction > 0):
        raise ConfigError(
            f"data.num_train {wanted}, data.val_fraction {val_fraction:g}: {count} training images leave {rest} to "
            f"train on and {num_val} to validate",
            f"at most num_train={rest}" if wanted > rest else "raise data.val_fraction",
        )
    return wanted, num_val


def split(images: ImageDataset, val_fraction: float, num_train: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Split a set: the last `val_fraction` is validation, the first `num_train` of the rest are trained on.

    There is no `val` where `val_fraction` is 0.
    """
    wanted, num_val = split_sizes(len(images.train_images), val_fraction, num_train)
    x, y = images.train_images, images.train_labels
    val = {"val": (x[-num_val:], y[-num_val:])} if num_val else {}
    return {"train": (x[:wanted], y[:wanted]), **val, "test": (images.test_images, images.test_labels)}


def steps_in_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of full batches; ConfigError where there is none."""
    if batch_size > num_images:
        raise ConfigError(
            f"batch_size {batch_size} is larger than the training set of {num_images} images",
            "lower batch_size or raise data.num_train",
        )
    return num_images // batch_size
