"""Train an object detector: a head on the feature maps of an ImageNet-pretrained backbone.

References: Redmon et al., 2016, "You only look once"; Lin et al., 2017, "Feature pyramid networks"; Feng et al., 2021,
"TOOD" (label assignment). The backbone is frozen: its feature maps of augmented views of every photo are computed once.
Differences from the paper: the backbone is fine-tuned in the last `finetune_epochs` only; `yolo_grid` and
`faster_rcnn_course` are the detectors of EECS 498, assignment 5.
Metrics: `val_map50` during training; at the end `map50`, `map50_95` and `ap50/CLASS` on the evaluated split (`test`
with evaluate_test, else `val`), by `map_rule`, of detections of at least `score_threshold`.
Command: cvlab train configs/yolo_scenes.yaml
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge, Le
from pydantic import Field, model_validator
from torch import Tensor, nn

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import photos
from cvlab.engine import device, loop, trainer
from cvlab.engine.task import ExportSpec, TrainTask
from cvlab.experiments.base import Evaluable, Experiment, Exportable, State
from cvlab.experiments.common import backbone_config
from cvlab.experiments.detection import evaluation, feature_cache, inference, plots
from cvlab.experiments.detection.data import dataset
from cvlab.experiments.detection.data.augment import AugmentConfig
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample
from cvlab.experiments.detection.evaluation import EvaluationRules
from cvlab.experiments.detection.feature_cache import CachedBatches, FeatureCache, FeatureCacheConfig
from cvlab.experiments.detection.models import registry as detector_registry
from cvlab.experiments.detection.models.base import DetectionHead, Targets
from cvlab.experiments.detection.models.registry import Detector, DetectorGraph, DetectorMetadata
from cvlab.ops.average_precision import DetectionMetrics
from cvlab.runs import checkpoint
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

Batch = tuple[list[Tensor], Targets]
TIMED_PHOTOS = 11
SHOWN_SCORE_THRESHOLD = 0.25  # of what is drawn and counted, as in `cvlab detect`


class DetectionDataConfig(backbone_config.PhotoDatasetConfig):
    """A detection data set."""

    source_type = dataset.DetectionDatasetSource


class DetectorConfig(backbone_config.BackboneTrainConfig):
    """A detector, its data and how it is trained."""

    data: DetectionDataConfig
    model: Annotated[schema.ComponentConfig, detector_registry.TABLE]
    size: Annotated[int, Ge(64), Le(2048)] = Field(320, description="side of the square input images in pixels")
    finetune_epochs: Annotated[int, Ge(0)] = Field(
        0, description="in the last N epochs the backbone's layers after the highest-resolution map are trained too"
    )
    views: schema.PositiveInt = Field(16, description="random views of each photo whose feature maps are cached")
    augment: AugmentConfig = Field(AugmentConfig())
    map_rule: Literal["voc07", "voc", "coco"] = Field("voc", description="how precision is averaged over recall")
    score_threshold: schema.Fraction = Field(0.001, description="detections of lower scores are dropped")
    nms_iou: schema.Fraction = Field(
        0.6, description="of detections of one class that overlap by more, the highest-scoring one stays"
    )

    @model_validator(mode="after")
    def _check_finetune_epochs(self) -> "DetectorConfig":
        self.check_final_epochs("finetune_epochs", self.finetune_epochs)
        return self


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
        arguments=config.model.arguments(),
        classes=boxset.classes,
        size_px=config.size,
        backbone=config.backbone,
        backbone_weights=config.backbone_weights,
        trained_on=boxset.name,
        is_finetuned=config.finetune_epochs > 0,
    )
    detector = detector_registry.build(metadata, ctx.device)
    rules = EvaluationRules(config.map_rule, config.score_threshold, config.nms_iou)
    return DetectionSetup(ctx, boxset, detector, rules)


def samples_of(config: DetectorConfig, boxset: DetectionDataset, split: str) -> Sequence[DetectionSample]:
    """Return the samples of a split. ConfigError if it has none, or fewer than `num_train`."""
    return config.data.items(boxset.name, boxset.splits, split)


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


def _compute_metrics(
    config: DetectorConfig, setup: DetectionSetup, head: DetectionHead[Any], cache: FeatureCache, split: str
) -> DetectionMetrics:
    """Evaluate a head on a split whose feature maps are cached."""
    detections = evaluation.predict_cached(head, cache, config.size, setup.rules, setup.ctx)
    samples = samples_of(config, setup.boxset, split)
    return evaluation.compute_metrics(detections, samples, len(setup.boxset.classes), setup.rules)


class DetectorExperiment(Experiment[DetectorConfig], Evaluable[DetectorConfig], Exportable[DetectorConfig]):
    """Train an object detector: a head on the feature maps of an ImageNet-pretrained backbone."""

    name = "detector"
    Config = DetectorConfig
    metrics = (
        *trainer.METRICS,
        Metric("val_map50", "fraction", "higher"),
        Metric("best_val_map50", "fraction", "higher"),
        Metric("map50", "fraction", "higher"),
        Metric("map50_95", "fraction", "higher"),
        Metric("ap50/*", "fraction", "higher"),
        Metric("seconds_per_photo", "s", "lower"),
        Metric("*_loss", better="lower"),
    )

    def run(self, config: DetectorConfig, run: RunDir) -> dict[str, float]:
        """Compute the feature maps, train the head, evaluate it, and save its weights in a file of their own."""
        setup = build(config)
        with StopRequest() as stop:
            check_interrupt = functools.partial(stop.raise_if_set, 0, run.path.name)
            train = cached_features(config, setup, "train", config.views, check_interrupt)
            val = cached_features(config, setup, "val", 0, check_interrupt)
        batches = CachedBatches(train, config.batch_size, config.seed, setup.ctx.device)
        if config.finetune_epochs:
            batches.finest_from = config.final_epochs_start(config.finetune_epochs, batches.sampler.steps_per_epoch)

        def evaluate(model: nn.Module) -> dict[str, float]:
            head = cast("DetectionHead[Any]", model)
            return {"val_map50": _compute_metrics(config, setup, head, val, "val").map50}

        task = TrainTask(
            model=setup.detector.head,
            loss_fn=make_loss_fn(config.size),
            get_batch=batches,
            steps_per_epoch=batches.sampler.steps_per_epoch,
            items_per_step=batches.sampler.batch_size,
            evaluate=evaluate,
            monitor="val_map50",
            ctx=setup.ctx,
        )
        model, metrics = trainer.train(config, task, run)
        head = cast("DetectionHead[Any]", model)
        run.write(
            detector_registry.WEIGHTS_FILE, lambda path: detector_registry.save(setup.detector.metadata, head, path)
        )
        split = "test" if config.evaluate_test else "val"
        last = val if split == "val" else cached_features(config, setup, "test", 0, check_interrupt)
        run.extra_summary |= {
            "map_rule": config.map_rule,
            "score_threshold": config.score_threshold,
            "evaluated_split": split,
        }
        metrics["seconds_per_photo"] = seconds_per_photo(config, setup, head, split)
        final = _compute_metrics(config, setup, head, last, split)
        return metrics | evaluation.reported_metrics(final, setup.boxset.classes)

    def evaluate(self, config: DetectorConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint; draw precision-recall curves and confusion matrices.

        Recall by size and the confusion matrix count detections of at least `SHOWN_SCORE_THRESHOLD`.
        """
        setup = build(config)
        head, classes = setup.detector.head, setup.boxset.classes
        checkpoint.load_eval_weights(head, state, str(base))
        metrics: dict[str, float] = {}
        for split in splits or tuple(name for name in ("val", "test") if setup.boxset.splits.get(name)):
            cache = cached_features(config, setup, split, 0, lambda: None)
            samples = samples_of(config, setup.boxset, split)
            detections = evaluation.predict_cached(head, cache, config.size, setup.rules, setup.ctx)
            result = evaluation.compute_metrics(detections, samples, len(classes), setup.rules)
            confusion = evaluation.confusion_matrix(detections, samples, len(classes), SHOWN_SCORE_THRESHOLD)
            plots.write(RunDir(base), result, confusion, classes, f"{split}_")
            values = evaluation.reported_metrics(result, classes)
            values |= evaluation.recall_by_size(detections, samples, SHOWN_SCORE_THRESHOLD)
            metrics |= {f"{split}_{name}": value for name, value in values.items()}
        return metrics

    def export_spec(self, config: DetectorConfig, base: Path, state: State) -> ExportSpec:
        """Return the detector of a checkpoint with its backbone; only heads with `output_names` have a graph."""
        setup = build(config)
        checkpoint.load_eval_weights(setup.detector.head, state, str(base))
        about = {
            "takes": f"images, float32 (N, 3, {config.size}, {config.size}) in [0, 1]: photos made to fit, gray below",
            "classes": setup.boxset.classes,
        }
        graph = DetectorGraph(setup.detector)
        if graph.output_names:
            about["gives"] = "scores (N, P, classes) in [0, 1] and boxes_xyxy (N, P, 4) in pixels, before NMS"
        example = torch.rand(1, 3, config.size, config.size)
        return ExportSpec(graph, setup.detector.head, example, graph.output_names, about)

    def plan(self, config: DetectorConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do; annotations are read, no photo is opened."""
        setup = build(config)
        num_views = len(samples_of(config, setup.boxset, "train")) * config.views
        steps_per_epoch = max(1, num_views // config.batch_size)
        return {
            "model": config.model.name,
            "parameters": sum(p.numel() for p in setup.detector.head.parameters()),
            "classes": ", ".join(setup.boxset.classes),
            "photos": ", ".join(f"{len(samples)} {split}" for split, samples in setup.boxset.splits.items()),
            "views": num_views,
            "steps": config.duration.num_steps(steps_per_epoch) or "as many as fit",
            **setup.ctx.as_dict(),
        }
