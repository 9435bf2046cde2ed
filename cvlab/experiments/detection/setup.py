"""What a detection configuration builds: data, detector, feature caches, loss and evaluation."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cvlab.data import photos
from cvlab.engine import device, loop
from cvlab.engine.task import TrainTask
from cvlab.experiments.detection import evaluation, feature_cache, inference
from cvlab.experiments.detection.config import DetectorConfig
from cvlab.experiments.detection.data import dataset, sizing
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample
from cvlab.experiments.detection.evaluation import EvaluationRules
from cvlab.experiments.detection.feature_cache import CachedBatches, FeatureCache, FeatureCacheConfig, FreshBatches
from cvlab.experiments.detection.models import detector as detector_model
from cvlab.experiments.detection.models.base import DetectionHead, Targets
from cvlab.experiments.detection.models.detector import Detector, DetectorMetadata
from cvlab.models.features import FeatureExtractor
from cvlab.ops.average_precision import DetectionMetrics, Detections
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

Batch = tuple[list[Tensor], Targets]
TIMED_PHOTOS = 11
SHOWN_SCORE_THRESHOLD = 0.25  # of what is drawn and counted, as in `cvlab detect`


@dataclass(frozen=True)
class DetectionSetup:
    """What a configuration builds.

    `size_px` and `num_views` are the configuration's `size` and `views`, or what suits the data set.
    """

    ctx: device.ComputeContext
    box_dataset: DetectionDataset
    detector: Detector
    rules: EvaluationRules
    size_px: int
    num_views: int


def build(config: DetectorConfig, box_dataset: DetectionDataset | None = None) -> DetectionSetup:
    """Read the data set's annotations, if none is given; build the detector, pretrained or with seeded weights."""
    ctx = config.compute_context()
    if box_dataset is None:
        box_dataset = dataset.load(config.data.name, data_root(), config.data.path, config.data.val_fraction)
    device.seed_everything(config.seed)
    size_px = sizing.input_size(config, box_dataset)
    metadata = DetectorMetadata(
        model=config.model.name,
        arguments=config.model.builder_arguments(),
        classes=box_dataset.classes,
        size_px=size_px,
        backbone=config.backbone,
        backbone_weights=config.backbone_weights,
        trained_on=box_dataset.name,
        is_finetuned=config.finetune_epochs > 0,
    )
    detector = detector_model.build(metadata, ctx.device)
    detector.base_head.load_pretrained(box_dataset.classes)
    rules = EvaluationRules(config.map_rule, config.score_threshold, config.nms_iou)
    return DetectionSetup(ctx, box_dataset, detector, rules, size_px, sizing.num_views(config, box_dataset))


def samples_of(config: DetectorConfig, box_dataset: DetectionDataset, split: str) -> Sequence[DetectionSample]:
    """Return the samples of a split. ConfigError if it has none, or fewer than `num_train`."""
    return config.data.items(box_dataset.name, box_dataset.splits, split)


def choose_final_split(
    config: DetectorConfig, setup: DetectionSetup, run: RunDir, check_interrupt: Callable[[], None]
) -> str:
    """Return the split that is evaluated at the end. DataError, before anything is trained, if it cannot be read."""
    split = config.final_split(setup.box_dataset.splits)
    if config.evaluate_test and split != "test":
        run.log(f"warning: {setup.box_dataset.name} has no test split; val is evaluated at the end")
    if not any(sample.has_boxes for sample in samples_of(config, setup.box_dataset, "val")):
        run.log("warning: val has no boxes: its mAP is undefined, and the last weights count as the best")
    for sample in samples_of(config, setup.box_dataset, split) if split == "test" else ():
        check_interrupt()
        photos.load(sample.path)
    return split


def cached_features(
    config: DetectorConfig, setup: DetectionSetup, split: str, num_views: int, check_interrupt: Callable[[], None]
) -> FeatureCache:
    """Compute the feature maps of a split: of random views, or, if `num_views` is 0, of each photo whole."""
    features = _features(config, setup) if num_views else setup.detector.features
    samples = samples_of(config, setup.box_dataset, split)
    cache_config = FeatureCacheConfig(
        size_px=setup.size_px,
        num_views=max(1, num_views),
        augment=config.augment if num_views else None,
        seed=config.seed,
        title=f"maps of {split}",
    )
    return feature_cache.build(features, samples, setup.ctx, cache_config, check_interrupt)


def _features(config: DetectorConfig, setup: DetectionSetup) -> FeatureExtractor:
    """Return what extracts the maps that training needs: all of them before the backbone is fine-tuned."""
    is_always_finetuned = config.finetune_epochs == config.duration.epochs
    return setup.detector.features if is_always_finetuned else setup.detector.all_features


def training_batches(
    config: DetectorConfig, setup: DetectionSetup, check_interrupt: Callable[[], None]
) -> CachedBatches | FreshBatches:
    """Return the batches of training: of cached maps, or, with `views: 0`, of new views in every epoch."""
    views = setup.num_views
    cache = cached_features(config, setup, "train", views, check_interrupt) if views else None
    return make_batches(config, setup, cache)


def make_batches(
    config: DetectorConfig, setup: DetectionSetup, cache: FeatureCache | None
) -> CachedBatches | FreshBatches:
    """Return the batches of cached maps, or, without a cache, of new views in every epoch."""
    if cache is not None:
        batches: CachedBatches | FreshBatches = CachedBatches(cache, config.batch_size, config.seed, setup.ctx.device)
    else:
        samples = samples_of(config, setup.box_dataset, "train")
        views = FeatureCacheConfig(setup.size_px, 1, config.augment, config.seed, "")
        batches = FreshBatches(_features(config, setup), samples, setup.ctx, views, config.batch_size)
    if config.finetune_epochs:
        batches.finest_from = config.final_epochs_start(config.finetune_epochs, batches.sampler.steps_per_epoch)
    return batches


def build_task(
    config: DetectorConfig,
    setup: DetectionSetup,
    batches: CachedBatches | FreshBatches,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> TrainTask:
    """Return what is trained: the head, its loss and its batches."""
    return TrainTask(
        model=setup.detector.head,
        loss_fn=make_loss_fn(setup.size_px),
        get_batch=batches,
        steps_per_epoch=batches.sampler.steps_per_epoch,
        items_per_step=batches.sampler.batch_size,
        evaluate=evaluate,
        monitor="val_map50",
        ctx=setup.ctx,
        split_batch=batch_splitter(config.accumulate),
        data_digest=setup.box_dataset.digest(),
    )


def batch_splitter(count: int) -> Callable[[Batch], list[Batch]] | None:
    """Return what splits a batch into `count` equal parts; None for one part.

    As with several processes, each part's loss is normalized by its own objects.
    """

    def split_batch(batch: Batch) -> list[Batch]:
        maps, targets = batch
        parts_of_maps = zip(*(level.chunk(count) for level in maps), strict=True)
        return [(list(levels), part) for levels, part in zip(parts_of_maps, targets.chunk(count), strict=True)]

    return split_batch if count > 1 else None


def make_loss_fn(size_px: int) -> loop.LossFn[Batch]:
    """Return the function that computes a head's own losses on a batch."""

    def loss_fn(model: nn.Module, batch: Batch) -> loop.Losses:
        maps, targets = batch
        losses: loop.Losses = model.losses(model(maps), targets, size_px)  # type: ignore[operator]
        return losses

    return loss_fn


def seconds_per_photo(config: DetectorConfig, setup: DetectionSetup, head: DetectionHead[Any], split: str) -> float:
    """Return the median time from a photo's pixels to its boxes, backbone included, one photo at a time."""
    predict = inference.make_predictor(dataclasses.replace(setup.detector, head=head.eval()), setup.ctx)
    durations = []
    for sample in samples_of(config, setup.box_dataset, split)[:TIMED_PHOTOS]:
        photo = photos.load(sample.path)
        start = time.perf_counter()
        predict([photo], SHOWN_SCORE_THRESHOLD, config.nms_iou)
        setup.ctx.synchronize()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def final_metadata(
    setup: DetectionSetup, detections: Sequence[Detections], samples: Sequence[DetectionSample]
) -> DetectorMetadata:
    """Return the detector's metadata with the score threshold that suits its detections in the validation photos."""
    threshold = evaluation.best_score_threshold(detections, samples)
    notes = {} if threshold is None else {"score_threshold": threshold}
    return dataclasses.replace(setup.detector.metadata, notes=setup.detector.metadata.notes | notes)


def compute_metrics(
    config: DetectorConfig, setup: DetectionSetup, head: DetectionHead[Any], cache: FeatureCache, split: str
) -> DetectionMetrics:
    """Evaluate a head on a split whose feature maps are cached."""
    detections = evaluation.predict_cached(head, cache, setup.size_px, setup.rules, setup.ctx)
    samples = samples_of(config, setup.box_dataset, split)
    return evaluation.compute_metrics(detections, samples, len(setup.box_dataset.classes), setup.rules)
