"""The maps that a frozen backbone makes of many views of photos, computed once and kept in memory.

A head on a frozen backbone sees nothing but these maps, so that a training of it costs a hundredth of one through the
whole net.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cvlab.console import Progress
from cvlab.data import photos, rng
from cvlab.distributed import sharding
from cvlab.engine import memory
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError
from cvlab.experiments.detection.data import augment
from cvlab.experiments.detection.data.dataset import DetectionSample
from cvlab.experiments.detection.models.base import Targets, padded
from cvlab.models.features import FeatureExtractor

BATCH = 16
FREE_SHARE = 0.6  # of the free memory, that the maps may take


@dataclass(frozen=True)
class Cached:
    """Maps of views, one tensor (V, H, W, C) for each level; the boxes of each view, where it lies in its photo.

    `sizes` are the photos' widths and heights.
    """

    maps: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]
    confidence: list[Tensor]
    places: list[augment.Drawn]
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.boxes)

    def batch(self, indices: Tensor, levels: int | None = None) -> tuple[list[Tensor], Targets]:
        """Return the maps (N, C, H, W), channels_last, of all levels or the finest, and the boxes of views."""
        found = indices.tolist()
        parts = ([values[k] for k in found] for values in (self.boxes, self.labels, self.confidence))
        targets = padded(*parts)
        return [level[indices].permute(0, 3, 1, 2) for level in self.maps[:levels]], targets


@dataclass(frozen=True)
class Request:
    """Which views: `num_views` random ones of each photo, or, without `changes`, each photo whole."""

    size_px: int
    num_views: int
    changes: augment.Changes | None
    seed: int
    title: str


def build(
    features: FeatureExtractor,
    items: Sequence[DetectionSample],
    ctx: ComputeContext,
    request: Request,
    check_interrupt: Callable[[], None],
) -> Cached:
    """Compute the maps of the views that are asked for; difficult boxes are no targets.

    `check_interrupt` is called now and then. ConfigError where the maps would not fit into the memory.
    """
    num_views = request.num_views
    count = len(items) * num_views
    kept: list[Tensor] = []
    boxes: list[Tensor] = []
    labels: list[Tensor] = []
    confidence: list[Tensor] = []
    places: list[augment.Drawn] = []
    sizes: list[tuple[int, int]] = []
    queue: list[Tensor] = []

    def flush() -> None:
        if not queue:
            return
        found = _look(features, torch.stack(queue), ctx)
        if not kept:
            _require_memory(found, count, ctx, num_views)
            kept.extend(level.new_empty(count, *level.shape[1:]) for level in found)
        for store, level in zip(kept, found, strict=True):
            store[len(boxes) - len(queue) : len(boxes)] = level
        queue.clear()

    with Progress(request.title, count, 0) as progress:
        for k, item in enumerate(items):
            photo = photos.load(item.path)
            for number in range(num_views):
                view, place = _view(photo, request, k, number)
                seen, which = place.visible(item.boxes_xyxy)
                queue.append(view)
                easy = ~item.difficult[which]
                boxes.append(seen[easy])
                labels.append(item.labels[which][easy])
                sure = torch.ones(len(item.labels)) if item.confidence is None else item.confidence
                confidence.append(sure[which][easy])
                places.append(place)
                sizes.append(photo.size)
                if len(queue) == BATCH:
                    flush()
            check_interrupt()
            if progress.due():
                progress.update(len(boxes), f"{item.path.name}")
        flush()
    return Cached(kept, boxes, labels, confidence, places, sizes)


def _view(photo: Image.Image, request: Request, k: int, number: int) -> tuple[Tensor, augment.Drawn]:
    size_px, changes, seed = request.size_px, request.changes, request.seed
    if changes is None:
        place = augment.whole(photo.width, photo.height, size_px)
        return photos.to_tensor(place.view(photo)), place
    place = augment.drawn(photo.width, photo.height, size_px, changes, seed, k, number)
    return augment.recoloured(photos.to_tensor(place.view(photo)), changes, seed, k, number), place


@torch.inference_mode()
def _look(features: FeatureExtractor, batch: Tensor, ctx: ComputeContext) -> list[Tensor]:
    with ctx.autocast():
        found = features.batch(batch.to(ctx.device))
    dtype = torch.bfloat16 if ctx.precision == "bfloat16" else torch.float32
    return [found[name].permute(0, 2, 3, 1).to(dtype).contiguous() for name in features.names]


def _require_memory(found: list[Tensor], count: int, ctx: ComputeContext, num_views: int) -> None:
    needed = sum(level[0].numel() * level.element_size() for level in found) * count
    free = memory.free_bytes(ctx.device)
    if free is not None and needed > FREE_SHARE * free:
        fits = int(num_views * FREE_SHARE * free / needed)
        raise ConfigError(
            f"views {num_views} of each photo need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            f"views={fits} fits" if fits else "a smaller size",
        )


class CachedBatches:
    """The batch of every step, as a pure function of (seed, step): shuffled epochs over all views.

    From step `finest_from` on only the finest map of each view is given.
    """

    def __init__(self, cached: Cached, batch_size: int, seed: int, device: torch.device) -> None:
        self.cached, self.device = cached, device
        self.epochs = rng.BatchSampler(seed, len(cached), batch_size, device)
        self.finest_from: int | None = None

    def __call__(self, step: int) -> tuple[list[Tensor], Targets]:
        """Return maps and boxes of a step: this process's share."""
        chosen = sharding.shard(self.epochs(step)[1])
        is_finest = self.finest_from is not None and step >= self.finest_from
        maps, targets = self.cached.batch(chosen, 1 if is_finest else None)
        return maps, targets.to(self.device)
