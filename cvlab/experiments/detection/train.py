"""Train an object detector: a head on the feature maps of an ImageNet-pretrained backbone.

References: Redmon et al., 2016, "You only look once"; Lin et al., 2017 (feature pyramid); Feng et al., 2021, "TOOD"
(which points are responsible). The backbone is frozen: its maps of augmented views of every photo are computed once.
Differences from the paper: from EECS 498, assignment 5, as `yolo_fpn` does; `yolo_grid` is the course's detector.
Metrics: `val_map50` while training; at the end of the split that is evaluated (`test` with evaluate_test, else `val`)
`map50`, `map50_95` and `ap50/CLASS`, by `map_rule` and above `confidence_floor`.
Command: cvlab train configs/yolo_scenes.yaml
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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
from cvlab.experiments.detection import evaluation as detection_evaluation
from cvlab.experiments.detection import feature_cache, inference, plots
from cvlab.experiments.detection.data import augment, dataset
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample
from cvlab.experiments.detection.evaluation import Rules
from cvlab.experiments.detection.feature_cache import Cached, CachedBatches
from cvlab.experiments.detection.models import registry as detector_registry
from cvlab.experiments.detection.models.base import Targets
from cvlab.experiments.detection.models.registry import About, Detector, WithBackbone
from cvlab.ops.average_precision import DetectionMetrics
from cvlab.runs import checkpoint
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

Batch = tuple[list[Tensor], Targets]
TIMED = 11  # photos, for the time of one
SHOWN_FLOOR = 0.25  # of what is drawn and counted, as in `cvlab detect`


class Data(backbone_config.PhotoDatasetConfig):
    """Which photos with boxes."""

    source_type = dataset.DetectionDatasetSource


class Augment(schema.FrozenModel):
    """How much the views of a photo differ."""

    zoom: Annotated[float, Ge(1), Le(8)] = Field(1.6, description="larger or smaller by up to this factor")
    aspect: Annotated[float, Ge(1), Le(4)] = Field(1.25, description="wider or higher by up to this factor")
    flip: bool = Field(True, description="mirror at random")
    brightness: schema.Fraction = Field(0.25, description="brighter or darker by up to this share")
    contrast: schema.Fraction = Field(0.25, description="more or less contrast by up to this share")
    saturation: schema.Fraction = Field(0.4, description="more or less colour by up to this share")


class DetectorConfig(backbone_config.BackboneTrainConfig):
    """A detector, its data and how it is trained."""

    data: Data
    model: Annotated[schema.ComponentConfig, detector_registry.TABLE]
    size: Annotated[int, Ge(64), Le(2048)] = Field(320, description="side of the square pictures in pixels")
    tune_epochs: Annotated[int, Ge(0)] = Field(
        0, description="so many epochs at the end the backbone's layers after the finest map learn too"
    )
    views: schema.PositiveInt = Field(16, description="random views of each photo that are kept as maps")
    augment: Augment = Field(Augment())
    map_rule: Literal["voc07", "voc", "coco"] = Field("voc", description="how precision is averaged over recall")
    confidence_floor: schema.Fraction = Field(0.001, description="detections below it are left out")
    nms_iou: schema.Fraction = Field(0.6, description="of two boxes of a class that overlap more, the better stays")

    @model_validator(mode="after")
    def _tunes_within(self) -> "DetectorConfig":
        self.require_last("tune_epochs", self.tune_epochs)
        return self


@dataclass(frozen=True)
class Parts:
    """What a configuration builds."""

    ctx: device.ComputeContext
    boxset: DetectionDataset
    detector: Detector
    rules: Rules


def build(config: DetectorConfig) -> Parts:
    """Read the set's annotations and build the detector, seeded."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    boxset = dataset.load(config.data.name, data_root(), config.data.path, config.data.val_fraction)
    device.seed_everything(config.seed)
    arguments = config.model.arguments()
    about = About(
        config.model.name,
        arguments,
        boxset.classes,
        config.size,
        config.backbone,
        config.backbone_weights,
        boxset.name,
        config.tune_epochs > 0,
    )
    detector = detector_registry.build(about, ctx.device)
    return Parts(ctx, boxset, detector, Rules(config.map_rule, config.confidence_floor, config.nms_iou))


def items_of(config: DetectorConfig, boxset: DetectionDataset, split: str) -> Sequence[DetectionSample]:
    """Return the photos of a split. ConfigError where it has none, or fewer than are asked for."""
    return config.data.items(boxset.name, boxset.splits, split)


def maps_of(
    config: DetectorConfig, parts: Parts, split: str, num_views: int, check_interrupt: Callable[[], None]
) -> Cached:
    """Compute the maps of a split: of random views, or, where `num_views` is 0, of each photo whole."""
    changes = augment.Changes(**config.augment.model_dump()) if num_views else None
    is_all = num_views > 0 and config.tune_epochs != config.duration.epochs
    features = parts.detector.all_features if is_all else parts.detector.features
    items = items_of(config, parts.boxset, split)
    title = f"maps of {split}"
    request = feature_cache.Request(config.size, max(1, num_views), changes, config.seed, title)
    return feature_cache.build(features, items, parts.ctx, request, check_interrupt)


def loss_function(size_px: int) -> loop.LossFn[Batch]:
    """Return the detector's own losses."""

    def loss_fn(model: nn.Module, batch: Batch) -> loop.Losses:
        maps, targets = batch
        found: loop.Losses = model.losses(model(maps), targets, size_px)  # type: ignore[operator]
        return found

    return loss_fn


def seconds_per_photo(config: DetectorConfig, parts: Parts, model: nn.Module, split: str) -> float:
    """Return the median time of a photo from its pixels to its boxes, the backbone with it, one photo at a time."""
    look = inference.looks(dataclasses.replace(parts.detector, head=model.eval()), parts.ctx)
    spent = []
    for item in items_of(config, parts.boxset, split)[:TIMED]:
        photo = photos.load(item.path)
        began = time.perf_counter()
        look([photo], SHOWN_FLOOR, config.nms_iou)
        parts.ctx.synchronize()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def _measure(config: DetectorConfig, parts: Parts, model: nn.Module, cached: Cached, split: str) -> DetectionMetrics:
    found = detection_evaluation.find(model, cached, config.size, parts.rules, parts.ctx)
    return detection_evaluation.measure(
        found, items_of(config, parts.boxset, split), len(parts.boxset.classes), parts.rules
    )


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
        """Compute the maps, train the head, evaluate it; keep its weights in a file of their own."""
        parts = build(config)
        with StopRequest() as stop:
            check_interrupt = functools.partial(stop.raise_if_set, 0, run.path.name)
            train = maps_of(config, parts, "train", config.views, check_interrupt)
            val = maps_of(config, parts, "val", 0, check_interrupt)
        batches = CachedBatches(train, config.batch_size, config.seed, parts.ctx.device)
        if config.tune_epochs:
            batches.finest_from = config.last_from(config.tune_epochs, batches.epochs.steps_per_epoch)

        def evaluation(model: nn.Module) -> dict[str, float]:
            return {"val_map50": _measure(config, parts, model, val, "val").map50}

        job = TrainTask(
            model=parts.detector.head,
            loss_fn=loss_function(config.size),
            get_batch=batches,
            steps_per_epoch=batches.epochs.steps_per_epoch,
            items_per_step=batches.epochs.batch_size,
            evaluate=evaluation,
            monitor="val_map50",
            ctx=parts.ctx,
        )
        model, metrics = trainer.train(config, job, run)
        run.write(detector_registry.FILE, lambda path: detector_registry.save(parts.detector.about, model, path))
        split = "test" if config.evaluate_test else "val"
        last = val if split == "val" else maps_of(config, parts, "test", 0, check_interrupt)
        run.extra_summary |= {
            "map_rule": config.map_rule,
            "confidence_floor": config.confidence_floor,
            "evaluated_split": split,
        }
        metrics["seconds_per_photo"] = seconds_per_photo(config, parts, model, split)
        return metrics | detection_evaluation.metrics(_measure(config, parts, model, last, split), parts.boxset.classes)

    def evaluate(self, config: DetectorConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint; draw precision-recall curves and confusion matrices.

        Recall by size of the boxes and the table of confusions count what is at least `SHOWN_FLOOR` sure.
        """
        parts = build(config)
        model = parts.detector.head
        checkpoint.load_eval_weights(model, state, str(base))
        chosen = splits or tuple(name for name in ("val", "test") if parts.boxset.splits.get(name))
        found: dict[str, float] = {}
        for split in chosen:
            cached = maps_of(config, parts, split, 0, lambda: None)
            items, classes = items_of(config, parts.boxset, split), parts.boxset.classes
            result = detection_evaluation.find(model, cached, config.size, parts.rules, parts.ctx)
            measured = detection_evaluation.measure(result, items, len(classes), parts.rules)
            confusion = detection_evaluation.confused(result, items, len(classes), SHOWN_FLOOR)
            plots.write(RunDir(base), measured, confusion, classes, f"{split}_")
            values = detection_evaluation.metrics(measured, classes) | detection_evaluation.recalls(
                result, items, SHOWN_FLOOR
            )
            found |= {f"{split}_{name}": value for name, value in values.items()}
        return found

    def export_spec(self, config: DetectorConfig, base: Path, state: State) -> ExportSpec:
        """Return the detector of a checkpoint with its backbone; only the one-stage detector has a graph."""
        parts = build(config)
        checkpoint.load_eval_weights(parts.detector.head, state, str(base))
        about = {
            "takes": f"images, float32 (N, 3, {config.size}, {config.size}) in [0, 1]: photos made to fit, grey below",
            "classes": parts.boxset.classes,
        }
        net = WithBackbone(parts.detector)
        if net.outputs:
            about["gives"] = "scores (N, P, classes) in [0, 1] and boxes_xyxy (N, P, 4) in pixels, with doubles"
        return ExportSpec(net, parts.detector.head, torch.rand(1, 3, config.size, config.size), net.outputs, about)

    def plan(self, config: DetectorConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do; annotations are read, no photo is opened."""
        parts = build(config)
        train = items_of(config, parts.boxset, "train")
        views_in_all = len(train) * config.views
        steps_per_epoch = max(1, views_in_all // config.batch_size)
        return {
            "model": config.model.name,
            "parameters": sum(p.numel() for p in parts.detector.head.parameters()),
            "classes": ", ".join(parts.boxset.classes),
            "photos": ", ".join(f"{len(items)} {split}" for split, items in parts.boxset.splits.items()),
            "views": views_in_all,
            "steps": config.duration.steps or (config.duration.epochs or 0) * steps_per_epoch or "as many as fit",
            **parts.ctx.as_dict(),
        }
