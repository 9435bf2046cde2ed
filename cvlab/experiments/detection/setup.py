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
from cvlab.experiments.detection import evaluation, feature_cache, inference
from cvlab.experiments.detection.config import DetectorConfig
from cvlab.experiments.detection.data import dataset
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample
from cvlab.experiments.detection.evaluation import EvaluationRules
from cvlab.experiments.detection.feature_cache import FeatureCache, FeatureCacheConfig
from cvlab.experiments.detection.models import detector as detector_model
from cvlab.experiments.detection.models.base import DetectionHead, Targets
from cvlab.experiments.detection.models.detector import Detector, DetectorMetadata
from cvlab.ops.average_precision import DetectionMetrics
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

Batch = tuple[list[Tensor], Targets]
TIMED_PHOTOS = 11
SHOWN_SCORE_THRESHOLD = 0.25  # of what is drawn and counted, as in `cvlab detect`


@dataclass(frozen=True)
class DetectionSetup:
    """What a configuration builds."""

    ctx: device.ComputeContext
    boxset: DetectionDataset
    detector: Detector
    rules: EvaluationRules


def build(config: DetectorConfig) -> DetectionSetup:
    """Read the data set's annotations and build the detector, with seeded random weights."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    boxset = dataset.load(config.data.name, data_root(), config.data.path, config.data.val_fraction)
    device.seed_everything(config.seed)
    metadata = DetectorMetadata(
        model=config.model.name,
        arguments=config.model.builder_arguments(),
        classes=boxset.classes,
        size_px=config.size,
        backbone=config.backbone,
        backbone_weights=config.backbone_weights,
        trained_on=boxset.name,
        is_finetuned=config.finetune_epochs > 0,
    )
    detector = detector_model.build(metadata, ctx.device)
    rules = EvaluationRules(config.map_rule, config.score_threshold, config.nms_iou)
    return DetectionSetup(ctx, boxset, detector, rules)


def samples_of(config: DetectorConfig, boxset: DetectionDataset, split: str) -> Sequence[DetectionSample]:
    """Return the samples of a split. ConfigError if it has none, or fewer than `num_train`."""
    return config.data.items(boxset.name, boxset.splits, split)


def choose_final_split(
    config: DetectorConfig, setup: DetectionSetup, run: RunDir, check_interrupt: Callable[[], None]
) -> str:
    """Return the split that is evaluated at the end. DataError, before anything is trained, if it cannot be read."""
    split = config.final_split(setup.boxset.splits)
    if config.evaluate_test and split != "test":
        run.log(f"warning: {setup.boxset.name} has no test split; val is evaluated at the end")
    if not any(sample.has_boxes for sample in samples_of(config, setup.boxset, "val")):
        run.log("warning: val has no boxes: its mAP is undefined, and the last weights count as the best")
    for sample in samples_of(config, setup.boxset, split) if split == "test" else ():
        check_interrupt()
        photos.load(sample.path)
    return split


def cached_features(
    config: DetectorConfig, setup: DetectionSetup, split: str, num_views: int, check_interrupt: Callable[[], None]
) -> FeatureCache:
    """Compute the feature maps of a split: of random views, or, if `num_views` is 0, of each photo whole."""
    needs_all_levels = num_views > 0 and config.finetune_epochs != config.duration.epochs
    features = setup.detector.all_features if needs_all_levels else setup.detector.features
    samples = samples_of(config, setup.boxset, split)
    cache_config = FeatureCacheConfig(
        size_px=config.size,
        num_views=max(1, num_views),
        augment=config.augment if num_views else None,
        seed=config.seed,
        title=f"maps of {split}",
    )
    return feature_cache.build(features, samples, setup.ctx, cache_config, check_interrupt)


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
    for sample in samples_of(config, setup.boxset, split)[:TIMED_PHOTOS]:
        photo = photos.load(sample.path)
        start = time.perf_counter()
        predict([photo], SHOWN_SCORE_THRESHOLD, config.nms_iou)
        setup.ctx.synchronize()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def compute_metrics(
    config: DetectorConfig, setup: DetectionSetup, head: DetectionHead[Any], cache: FeatureCache, split: str
) -> DetectionMetrics:
    """Evaluate a head on a split whose feature maps are cached."""
    detections = evaluation.predict_cached(head, cache, config.size, setup.rules, setup.ctx)
    samples = samples_of(config, setup.boxset, split)
    return evaluation.compute_metrics(detections, samples, len(setup.boxset.classes), setup.rules)
