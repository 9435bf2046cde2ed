"""What a frozen backbone makes of a data set's images, computed once and kept on the disk, and batches of it.

The classifier of a `TransferClassifier` is trained on the features of several augmented views of each image, its tail
in the last epochs on the maps that the trunk makes of the same views. Both cost a fraction of the whole network.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvlab.console import Progress
from cvlab.data.digest import DataDigest
from cvlab.distributed import sharding
from cvlab.engine.device import ComputeContext, upload
from cvlab.experiments.classification.data.augment import Augmentation
from cvlab.experiments.classification.data.images import (
    Images,
    Normalization,
    TrainLoader,
    add_images,
)
from cvlab.experiments.classification.models.transfer import TransferClassifier
from cvlab.runs import checkpoint
from cvlab.storage.cache import data_root
from cvlab.storage.row_cache import RowSpec, load_or_compute

CACHE_FOLDER = "features-v2"
BLOCK = 32  # images that go through the network together


@dataclass(frozen=True)
class Views:
    """Which views of the images of a split: the image itself, then `count - 1` augmented ones."""

    count: int
    augment: Augmentation
    seed: int


class FeatureStore:
    """Features and maps of a split's images, computed where they are first asked for.

    Args:
        model: The classifier, whose trunk and tail are those of the pretraining.
        images: uint8 (N, H, W, C).
        views: V views of each image; view v of image k is row k * V + v.
        normalize: The backbone's normalization.
        ctx: Device and precision.
        title: Title of the progress bar.
        check_interrupt: Called after each block; may raise to stop.
    """

    def __init__(
        self,
        model: TransferClassifier,
        images: Images,
        views: Views,
        normalize: Normalization,
        ctx: ComputeContext,
        title: str,
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.images, self.views, self.normalize = model, images, views, normalize
        self.ctx, self.title, self.check_interrupt = ctx, title, check_interrupt
        self._arrays: dict[str, Tensor] = {}
        self._key = self._digest()  # before a checkpoint with other weights is loaded

    def rows(self, part: str) -> Tensor:
        """Return `features` (N * V, F) or `maps` (N * V, ...), float16."""
        if part not in self._arrays:
            self._arrays[part] = self._load(part)
        return self._arrays[part]

    def _load(self, part: str) -> Tensor:
        view_count = self.views.count
        shape = self.model.map_shape if part == "maps" else tuple(self.model.mean.shape)
        count = len(self.images) * view_count
        spec = RowSpec(count, shape, np.dtype(np.float16), BLOCK * view_count)
        with Progress(f"{part} of {self.title}", count, 0) as progress:

            def compute(start: int, end: int) -> tuple[np.ndarray, list[Any]]:
                rows = self._compute(part, start // view_count, end // view_count)
                self.check_interrupt()
                if progress.due():
                    progress.update(end, "")
                return rows.numpy(), [None] * len(rows)

            array = load_or_compute(data_root() / CACHE_FOLDER / f"{self._key}-{part}", spec, compute)
        return torch.from_numpy(array.rows)

    @torch.no_grad()
    def _compute(self, part: str, start: int, end: int) -> Tensor:
        """Return the rows of all views of the images from `start` to `end`."""
        images = self.images[start:end]
        indices = torch.arange(start, end, device=images.device)
        outputs = []
        for view in range(self.views.count):
            pixels = self.views.augment(images, indices, self.views.seed, view - 1) if view else images
            batch = self.normalize(pixels.permute(0, 3, 1, 2)).to(self.ctx.device)
            with self.ctx.autocast():
                maps = self.model.trunk(batch)
                output = maps if part == "maps" else self.model.tail(maps)
            outputs.append(output.to("cpu", torch.float16))
        return torch.stack(outputs, 1).flatten(0, 1)

    def _digest(self) -> str:
        """Return a digest of all that the rows depend on."""
        weights = {**self.model.trunk.state_dict(), **{f"tail.{k}": v for k, v in self.model.tail.state_dict().items()}}
        about = {
            "weights": checkpoint.weights_digest(weights),
            "views": self.views.count,
            "augment": asdict(self.views.augment) if self.views.count > 1 else None,
            "seed": self.views.seed if self.views.count > 1 else None,
            "precision": self.ctx.precision,
        }
        pixels = DataDigest()
        add_images(pixels, self.images)
        return hashlib.sha256((json.dumps(about, sort_keys=True) + pixels.hex()).encode()).hexdigest()[:24]

    def batches(self, part: str, labels: Tensor, limit: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's shard of the first view of the first `limit` images, in order, with their labels."""
        rows = self.rows(part)
        first, end = sharding.shard_range(min(limit, len(labels)))
        for start in range(first, end, batch_size):
            stop = min(start + batch_size, end)
            chosen = torch.arange(start, stop) * self.views.count
            yield upload(rows[chosen], self.ctx.device), labels[start:stop]


class FeatureLoader(TrainLoader):
    """The batch of every step as a pure function of (seed, step): features, and from `finetune_from` on maps.

    In epoch e each image is seen in view e mod V.
    """

    def __init__(self, store: FeatureStore, labels: Tensor, batch_size: int, seed: int) -> None:
        super().__init__(store.images, labels, batch_size, seed, store.normalize)
        self.store = store
        self.finetune_from: int | None = None

    def part_at(self, step: int) -> str:
        """Return what a step is trained on: `features` or `maps`."""
        return "maps" if self.finetune_from is not None and step >= self.finetune_from else "features"

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's shard of the batch of a step: features or maps, and labels (N,)."""
        indices = sharding.shard(self.batch_indices(step))
        views = self.store.views.count
        chosen = indices * views + self.locate(step)[0] % views
        rows = self.store.rows(self.part_at(step))
        return upload(rows[chosen], self.store.ctx.device), self.labels[upload(indices, self.labels.device)]

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the indices of the images of an epoch, on the CPU, where their features are."""
        return super().epoch_order(epoch).cpu()
