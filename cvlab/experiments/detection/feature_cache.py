"""The feature maps that a frozen backbone computes for many views of photos, computed once and kept in memory.

A head on a frozen backbone reads nothing but these maps, so training it costs a hundredth of training through the
whole network.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cvlab.console import Progress
from cvlab.data import photos, prefetch, rng
from cvlab.distributed import sharding
from cvlab.engine import memory
from cvlab.engine.device import ComputeContext, upload
from cvlab.errors import ConfigError
from cvlab.experiments.detection.config import AugmentConfig
from cvlab.experiments.detection.data import augment
from cvlab.experiments.detection.data.augment import ViewTransform
from cvlab.experiments.detection.data.dataset import DetectionSample
from cvlab.experiments.detection.models.base import Targets, collate_targets
from cvlab.models.features import FeatureExtractor

BATCH_SIZE = 16
MAX_FREE_FRACTION = 0.6  # of the free memory, that the maps may take


@dataclass(frozen=True)
class CachedView:
    """The ground truth of one view, in its pixels, and where it lies in its photo.

    boxes_xyxy: (K, 4). labels: int64 (K,). confidence: (K,), in [0, 1]. ignored: bool (K,), of difficult boxes.
    photo_size: width and height.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    confidence: Tensor
    ignored: Tensor
    transform: ViewTransform
    photo_size: tuple[int, int]


@dataclass(frozen=True)
class FeatureCache:
    """The maps of V views, one tensor (V, H, W, C) per level, highest resolution first, and the views themselves."""

    maps: list[Tensor]
    views: list[CachedView]

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, indices: Tensor, num_levels: int | None = None) -> tuple[list[Tensor], Targets]:
        """Return maps (N, C, H, W), channels_last, of all or the first `num_levels` levels, and targets of views."""
        views = [self.views[k] for k in indices.tolist()]
        indices = upload(indices, self.maps[0].device)
        return [level[indices].permute(0, 3, 1, 2) for level in self.maps[:num_levels]], _collate_views(views)


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Which views: `num_views` random ones of each photo, or, without `augment`, each photo whole.

    `title` names the progress bar.
    """

    size_px: int
    num_views: int
    augment: AugmentConfig | None
    seed: int
    title: str


def build(
    features: FeatureExtractor,
    samples: Sequence[DetectionSample],
    ctx: ComputeContext,
    config: FeatureCacheConfig,
    check_interrupt: Callable[[], None],
) -> FeatureCache:
    """Compute the maps of all views; difficult boxes are ignored. A thread renders views while the backbone runs.

    `check_interrupt` is called after every view. ConfigError if the maps would not fit into memory.
    """
    writer = _MapWriter(features, ctx, len(samples), config.num_views)
    views: list[CachedView] = []
    rendered = prefetch.read_ahead(_render_views(samples, config), 2 * BATCH_SIZE, check_interrupt)
    with Progress(config.title, len(samples) * config.num_views, 0) as progress, contextlib.closing(rendered):
        for sample, image, view in rendered:
            writer.add(image)
            views.append(view)
            check_interrupt()
            if progress.due():
                progress.update(len(views), f"{sample.path.name}")
        writer.flush()
    return FeatureCache(writer.maps, views)


def _render_views(
    samples: Sequence[DetectionSample], config: FeatureCacheConfig
) -> Generator[tuple[DetectionSample, Image.Image, CachedView], None, None]:
    """Yield all views of each photo in turn; a photo is decoded once."""
    for index, sample in enumerate(samples):
        photo = photos.load(sample.path)
        for number in range(config.num_views):
            image, transform = _render_view(photo, config, index, number)
            yield sample, image, _cached_view(sample, transform, photo.size)


class _MapWriter:
    """Runs the backbone on batches of views and writes their maps into tensors allocated at the first batch."""

    def __init__(self, features: FeatureExtractor, ctx: ComputeContext, num_photos: int, num_views: int) -> None:
        self.features, self.ctx, self.num_photos, self.num_views = features, ctx, num_photos, num_views
        self.maps: list[Tensor] = []
        self.pending: list[Image.Image] = []
        self.num_written = 0

    def add(self, image: Image.Image) -> None:
        """Add a view."""
        self.pending.append(image)
        if len(self.pending) == BATCH_SIZE:
            self.flush()

    def flush(self) -> None:
        """Compute and write the maps of the pending views."""
        if not self.pending:
            return
        batch_maps = _compute_maps(self.features, self.pending, self.ctx)
        if not self.maps:
            count = self.num_photos * self.num_views
            _check_memory(batch_maps, count, self.ctx, self.num_views)
            self.maps = [level.new_empty(count, *level.shape[1:]) for level in batch_maps]
        end = self.num_written + len(self.pending)
        for stored, level in zip(self.maps, batch_maps, strict=True):
            stored[self.num_written : end] = level
        self.num_written = end
        self.pending.clear()


def _render_view(
    photo: Image.Image, config: FeatureCacheConfig, index: int, number: int
) -> tuple[Image.Image, ViewTransform]:
    """Return view `number` of photo `index`, and its transform."""
    if config.augment is None:
        transform = augment.whole_photo(photo.width, photo.height, config.size_px)
        return transform.render(photo), transform
    transform = augment.random_view(
        photo.width, photo.height, config.size_px, config.augment, config.seed, index, number
    )
    image = augment.color_jitter(transform.render(photo), config.augment, config.seed, index, number)
    return image, transform


def _cached_view(sample: DetectionSample, transform: ViewTransform, photo_size: tuple[int, int]) -> CachedView:
    """Return the ground truth of a view: the boxes visible in it."""
    boxes_xyxy, index = transform.visible_boxes(sample.boxes_xyxy)
    confidence = torch.ones(len(sample.labels)) if sample.confidence is None else sample.confidence
    return CachedView(
        boxes_xyxy, sample.labels[index], confidence[index], sample.difficult[index], transform, photo_size
    )


@torch.no_grad()
def _compute_maps(features: FeatureExtractor, views: Sequence[Image.Image], ctx: ComputeContext) -> list[Tensor]:
    """Return each level's maps (N, H, W, C) of N views, in the training precision."""
    with ctx.autocast():
        maps = features.batch(photos.to_batch(views).to(ctx.device))
    dtype = torch.bfloat16 if ctx.precision == "bfloat16" else torch.float32
    return [maps[name].permute(0, 2, 3, 1).to(dtype).contiguous() for name in features.names]


def _check_memory(maps: list[Tensor], count: int, ctx: ComputeContext, num_views: int) -> None:
    """Raise ConfigError if the maps of `count` views would not fit into the free memory."""
    needed = sum(level[0].numel() * level.element_size() for level in maps) * count
    free = memory.free_bytes(ctx.device)
    if free is not None and needed > MAX_FREE_FRACTION * free:
        fits = int(num_views * MAX_FREE_FRACTION * free / needed)
        raise ConfigError(
            f"views {num_views} of each photo need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            f"views={fits} fits" if fits else "a smaller size",
        )


class CachedBatches:
    """The batch of every step as a pure function of (seed, step): shuffled epochs over all views.

    From step `finest_from` on, only the highest-resolution map of each view is returned.
    """

    def __init__(self, cache: FeatureCache, batch_size: int, seed: int, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self.sampler = rng.BatchSampler(seed, len(cache), batch_size, torch.device("cpu"))  # as the views are
        self.finest_from: int | None = None

    def __call__(self, step: int) -> tuple[list[Tensor], Targets]:
        """Return this rank's shard of a step's maps and targets."""
        indices = sharding.shard(self.sampler(step)[1])
        is_finest_only = self.finest_from is not None and step >= self.finest_from
        maps, targets = self.cache.batch(indices, 1 if is_finest_only else None)
        return maps, targets.to(self.device)


class FreshBatches:
    """The batch of every step as a pure function of (seed, step): new random views of every photo in each epoch.

    The backbone computes the maps of a batch when it is asked for, so that nothing is kept in memory.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        samples: Sequence[DetectionSample],
        ctx: ComputeContext,
        config: FeatureCacheConfig,
        batch_size: int,
    ) -> None:
        self.features, self.samples, self.ctx, self.config = features, samples, ctx, config
        self.sampler = rng.BatchSampler(config.seed, len(samples), batch_size, torch.device("cpu"))
        self.finest_from: int | None = None

    def __call__(self, step: int) -> tuple[list[Tensor], Targets]:
        """Return this rank's shard of a step's maps and targets."""
        epoch, indices = self.sampler(step)
        images, views = [], []
        for index in sharding.shard(indices).tolist():
            sample = self.samples[index]
            photo = photos.load(sample.path)
            image, transform = _render_view(photo, self.config, index, epoch)
            images.append(image)
            views.append(_cached_view(sample, transform, photo.size))
        maps = [level.permute(0, 3, 1, 2) for level in _compute_maps(self.features, images, self.ctx)]
        is_finest_only = self.finest_from is not None and step >= self.finest_from
        return maps[:1] if is_finest_only else maps, _collate_views(views).to(self.ctx.device)


def _collate_views(views: Sequence[CachedView]) -> Targets:
    """Return the targets of some views."""
    return collate_targets(
        [view.boxes_xyxy for view in views],
        [view.labels for view in views],
        [view.confidence for view in views],
        [view.ignored for view in views],
    )
