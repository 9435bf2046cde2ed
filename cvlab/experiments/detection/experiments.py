"""Detection: train an object detector, detect objects in photos. The methods import torch."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cvlab.config.metrics import Metric
from cvlab.engine.config import TRAIN_METRICS
from cvlab.experiments.base import (
    DetectsObjects,
    Evaluable,
    Exportable,
    HasPhotoModule,
    HasSummary,
    HasTrainTask,
    PhotoExperiment,
    ShowsData,
    State,
    default_splits,
)
from cvlab.experiments.detection.config import WEIGHTS_FILE, DetectConfig, DetectorConfig
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from torch import nn

    from cvlab.engine.device import ComputeContext
    from cvlab.engine.task import ExportSpec, TrainTask
    from cvlab.experiments.common.data_overview import DataOverview
    from cvlab.experiments.detection.models.base import DetectionHead
    from cvlab.models.photo_module import PhotoModule
    from cvlab.models.summary import SummarySpec

COLUMNS = (
    Column("objects", "objects"),
    Column("frames", "frames"),
    Column("picture", "picture", is_file=True),
    Column("video", "video", is_file=True),
    Column("tracks", "tracks", is_file=True),
    Column("explained", "diagram", is_file=True),
    Column("evidence", "evidence", is_file=True),
    Column("txt", "YOLO txt", is_file=True),
    Column("xml", "VOC XML", is_file=True),
)


class DetectExperiment(PhotoExperiment[DetectConfig], DetectsObjects):
    """Detect objects in photos or a video and draw their boxes; without them, evaluate on the validation split.

    References:
        Redmon et al., 2016, "You only look once"; Redmon and Farhadi, 2018, "YOLOv3" (yolov3_tiny);
        Akyon et al., 2022, "Slicing aided hyper inference" (tile); Zhang et al., 2022, "ByteTrack" (track).

    Differences from the paper:
        A weights file says which detector it belongs to, its classes and what it was trained on.

    Metrics:
        `num_photos`, `num_objects`; of a video `num_frames`, `frames_per_second` and `num_tracks`, without tracking
        `num_objects`; without both `map50`, `map50_95` and `ap50/CLASS` on the validation photos.

    Command:
        cvlab detect photo.jpg
    """

    name = "detect"
    Config = DetectConfig
    columns = COLUMNS
    metrics = (
        Metric("num_photos", when=lambda config: config.source is None),
        Metric(
            "num_objects", when=lambda config: bool(config.images) or (config.source is not None and not config.track)
        ),
        Metric("num_frames", when=lambda config: config.source is not None),
        Metric("num_tracks", when=lambda config: config.source is not None and config.track),
        Metric("frames_per_second", "frames/s", "higher", lambda config: config.source is not None),
        Metric("map50", "fraction", "higher", lambda config: not config.images and config.source is None),
        Metric("map50_95", "fraction", "higher", lambda config: not config.images and config.source is None),
    )

    def run(self, config: DetectConfig, run: RunDir) -> dict[str, float]:
        """Detect objects in all photos or all frames of a video, or evaluate the detector."""
        from cvlab.experiments.common import photo_batches
        from cvlab.experiments.detection import evaluation, explanation, inference, video
        from cvlab.experiments.detection.inference import PhotoDetector, load_configured_detector

        _, detector = self.load_once(config, load_configured_detector)
        run.log(f"detecting with {detector.description}")
        run.folder("images")
        if config.source is not None:
            return video.run(config, detector, run, self.columns)
        if not config.images:
            metrics = evaluation.evaluate_on_validation(detector, run, config.batch_size, detector.score_threshold)
            sheet = PhotoResult(evaluation.SHEET, files={"picture": evaluation.SHEET})
            run.extra_summary |= summarize([sheet], self.columns)
            return metrics
        photo_detector = PhotoDetector(detector, run, config.iou, config.save, config.explain)
        work: photo_batches.BatchFn = photo_detector
        if config.explain_box is not None:
            work = explanation.DetectionExplainer(photo_detector, config.explain_box, config.window)
        results = photo_batches.run(config, run, work, "detect", self.columns)
        if config.explain_box is not None:
            explanation.require_any(results, config.explain_box)
        inference.save_coco(detector, results, run, [kind for kind in ("json", "coco") if kind in config.save])
        if "csv" in config.save:
            inference.save_csv(results, run)
        counts = inference.class_counts(obj["label"] for result in results for obj in result.values["objects"])
        photos = f"{len(results)} photo{'s' * (len(results) != 1)}"
        run.extra_summary |= {"class_counts": counts, "headline": inference.headline(counts, "object", photos)}
        return {"num_photos": len(results), "num_objects": sum(counts.values())}

    def plan(self, config: DetectConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. DataError if the weights, or all of the photos or the video, are missing."""
        from cvlab.data import videos
        from cvlab.experiments.common import photo_batches
        from cvlab.experiments.detection.inference import load_configured_detector

        ctx, detector = self.load_once(config, load_configured_detector)
        inputs: dict[str, Any] = {"photos": "its validation photos"}
        if config.source is not None:
            info = videos.probe(config.source)
            inputs = {"video": config.source, "frames": info.num_frames, "frames_per_second": float(info.rate)}
        elif config.images:
            inputs = {"photos": len(photo_batches.resolve_images(config.images)[1])}
        return {
            **inputs,
            "detector": detector.description,
            "classes": ", ".join(config.classes or detector.classes),
            "parameters": detector.num_parameters,
            **ctx.as_dict(),
        }

    def bundled_detector(self, name: str, ctx: "ComputeContext", score_threshold: float) -> "PhotoModule":
        """Return a bundled detector for photos in memory."""
        from cvlab.experiments.detection import photo_module

        return photo_module.load_bundled(name, ctx, score_threshold)


class DetectorExperiment(
    ShowsData[DetectorConfig],
    Evaluable[DetectorConfig],
    Exportable[DetectorConfig],
    HasPhotoModule[DetectorConfig],
    HasSummary[DetectorConfig],
    HasTrainTask[DetectorConfig],
):
    """Train an object detector: a head on the feature maps of an ImageNet-pretrained backbone.

    References:
        Redmon et al., 2016, "You only look once"; Lin et al., 2017, "Feature pyramid networks"; Feng et al., 2021,
        "TOOD" (label assignment). The backbone is frozen: its feature maps of augmented views of every photo are
        computed once.

    Differences from the paper:
        The backbone is fine-tuned in the last `finetune_epochs` only; `yolo_grid` and `faster_rcnn_course` are the
        detectors of EECS 498, assignment 5.

    Metrics:
        `val_map50` during training; at the end `map50`, `map50_95` and `ap50/CLASS` on the evaluated split (`test`
        with evaluate_test, else `val`), by `map_rule`, of detections of at least `score_threshold`.

    Command:
        cvlab train configs/yolo_scenes.yaml
    """

    name = "detector"
    Config = DetectorConfig
    metrics = (
        *TRAIN_METRICS,
        Metric("val_map50", "fraction", "higher"),
        Metric("best_val_map50", "fraction", "higher"),
        Metric("map50", "fraction", "higher"),
        Metric("map50_95", "fraction", "higher"),
        Metric("ap50/*", "fraction", "higher"),
        Metric("seconds_per_photo", "s", "lower"),
        Metric("*_loss", better="lower"),
    )

    def data_overview(self, config: DetectorConfig, base: Path, num_samples: int) -> "DataOverview":
        """Return what the data set consists of, with some training photos and their boxes."""
        from cvlab.experiments.detection.data import dataset, overview
        from cvlab.storage.cache import data_root

        loaded = dataset.load(config.data.name, data_root(), config.data.path, config.data.val_fraction)
        return overview.build(config, loaded, num_samples)

    def run(self, config: DetectorConfig, run: RunDir) -> dict[str, float]:
        """Compute the feature maps, train the head, evaluate it, and save its weights in a file of their own."""
        from cvlab.engine import trainer
        from cvlab.experiments.detection import evaluation
        from cvlab.experiments.detection.models import detector as detector_model
        from cvlab.experiments.detection.setup import (
            build,
            build_task,
            cached_features,
            choose_final_split,
            compute_metrics,
            final_metadata,
            samples_of,
            seconds_per_photo,
            training_batches,
        )

        setup = build(config)
        with StopRequest() as stop:
            check_interrupt = functools.partial(stop.raise_if_set, 0, run.path.name)
            batches = training_batches(config, setup, check_interrupt)
            val = cached_features(config, setup, "val", 0, check_interrupt)
            split = choose_final_split(config, setup, run, check_interrupt)

        def evaluate(model: "nn.Module") -> dict[str, float]:
            head = cast("DetectionHead[Any]", model)
            map50 = compute_metrics(config, setup, head, val, "val").map50
            return {"val_map50": map50} if not math.isnan(map50) else {}  # undefined without boxes

        task = build_task(config, setup, batches, evaluate)
        model, metrics = trainer.train(config, task, run)
        head = cast("DetectionHead[Any]", model)
        samples = samples_of(config, setup.box_dataset, "val")
        detections = evaluation.predict_cached(head, val, setup.size_px, setup.rules, setup.ctx)
        metadata = final_metadata(setup, detections, samples)
        run.write(WEIGHTS_FILE, lambda path: detector_model.save(metadata, head, path))
        if split == "test":
            test = cached_features(config, setup, "test", 0, check_interrupt)
            samples = samples_of(config, setup.box_dataset, "test")
            detections = evaluation.predict_cached(head, test, setup.size_px, setup.rules, setup.ctx)
        run.extra_summary |= {
            "map_rule": config.map_rule,
            "score_threshold": config.score_threshold,
            "evaluated_split": split,
        }
        metrics["seconds_per_photo"] = seconds_per_photo(config, setup, head, split)
        final = evaluation.compute_metrics(detections, samples, len(setup.box_dataset.classes), setup.rules)
        return metrics | evaluation.reported_metrics(final, setup.box_dataset.classes)

    def evaluate(self, config: DetectorConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint; draw precision-recall curves and confusion matrices.

        Recall by size and the confusion matrix count detections of at least `SHOWN_SCORE_THRESHOLD`.
        """
        from cvlab.experiments.detection import evaluation, plots
        from cvlab.experiments.detection.setup import SHOWN_SCORE_THRESHOLD, build, cached_features, samples_of
        from cvlab.runs import checkpoint

        setup = build(config)
        head, classes = setup.detector.head, setup.box_dataset.classes
        checkpoint.load_eval_weights(head, state, str(base))
        metrics: dict[str, float] = {}
        for split in splits or default_splits(setup.box_dataset.splits):
            cache = cached_features(config, setup, split, 0, lambda: None)
            samples = samples_of(config, setup.box_dataset, split)
            detections = evaluation.predict_cached(head, cache, setup.size_px, setup.rules, setup.ctx)
            result = evaluation.compute_metrics(detections, samples, len(classes), setup.rules)
            confusion = evaluation.confusion_matrix(detections, samples, len(classes), SHOWN_SCORE_THRESHOLD)
            plots.write(RunDir(base), result, confusion, classes, f"{split}_")
            values = evaluation.reported_metrics(result, classes)
            values |= evaluation.recall_by_size(detections, samples, SHOWN_SCORE_THRESHOLD)
            metrics |= {f"{split}_{name}": value for name, value in values.items()}
        return metrics

    def export_spec(self, config: DetectorConfig, base: Path, state: State) -> "ExportSpec":
        """Return the detector of a checkpoint with its backbone; only heads with `output_names` have a graph."""
        import torch

        from cvlab.engine.task import ExportSpec
        from cvlab.experiments.detection.data.augment import preprocessing
        from cvlab.experiments.detection.models.detector import DetectorGraph
        from cvlab.experiments.detection.setup import build
        from cvlab.runs import checkpoint

        setup = build(config)
        checkpoint.load_eval_weights(setup.detector.head, state, str(base))
        metadata = {
            "input": f"images, float32 (N, 3, {setup.size_px}, {setup.size_px}) in [0, 1], RGB",
            "preprocessing": preprocessing(setup.size_px),
            "classes": setup.box_dataset.classes,
        }
        graph = DetectorGraph(setup.detector)
        if graph.output_names:
            metadata["output"] = "scores (N, P, classes) in [0, 1] and boxes_xyxy (N, P, 4) in pixels, before NMS"
        example = torch.rand(1, 3, setup.size_px, setup.size_px)
        return ExportSpec(graph, setup.detector.head, example, graph.output_names, metadata)

    def photo_module(self, config: DetectorConfig, base: Path, weights: str, device: str) -> "PhotoModule":
        """Return the detector of a completed run for images in memory."""
        from cvlab.experiments.detection import photo_module
        from cvlab.runs import checkpoint

        checkpoint.require_last(weights, self.name)
        return photo_module.load(base, device)

    def train_task(self, config: DetectorConfig, base: Path, check_interrupt: Callable[[], None]) -> "TrainTask":
        """Return the untrained head, its loss and its batches; features of the training photos are computed."""
        from cvlab.experiments.detection.setup import build, build_task, training_batches

        setup = build(config)
        return build_task(config, setup, training_batches(config, setup, check_interrupt), lambda _: {})

    def synthetic_task(self, config: DetectorConfig, base: Path) -> "TrainTask":
        """Return the untrained head, its loss and batches of one photo with random boxes."""
        from cvlab.experiments.detection import synthetic

        return synthetic.build_task(config)

    def summary_spec(self, config: DetectorConfig, base: Path) -> "SummarySpec":
        """Return backbone and head, and a black image; annotations are read, no photo is opened."""
        import torch

        from cvlab.experiments.detection.setup import build
        from cvlab.models.summary import SummarySpec

        setup = build(config.model_copy(update={"device": "cpu", "precision": "float32"}))
        backbone, head = setup.detector.features, setup.detector.head

        def forward(images: torch.Tensor) -> object:
            maps = backbone.module(images)
            return head([maps[name] for name in backbone.names])

        example = torch.zeros(1, 3, setup.size_px, setup.size_px)
        return SummarySpec({"backbone": backbone.module, "head": head}, forward, example)

    def plan(self, config: DetectorConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do; annotations are read, no photo is opened."""
        from cvlab.engine import parameters
        from cvlab.experiments.detection.setup import build, samples_of

        setup = build(config)
        parameters.build_optimizer(config, setup.detector.head)
        num_views = len(samples_of(config, setup.box_dataset, "train")) * max(1, setup.num_views)
        steps_per_epoch = max(1, num_views // config.batch_size)
        return {
            "model": config.model.name,
            "parameters": sum(p.numel() for p in setup.detector.head.parameters()),
            "classes": ", ".join(setup.box_dataset.classes),
            "photos": ", ".join(f"{len(samples)} {split}" for split, samples in setup.box_dataset.splits.items()),
            "evaluated_split": config.final_split(setup.box_dataset.splits),
            "size": setup.size_px,
            "views": num_views,
            "steps": config.duration.num_steps(steps_per_epoch) or "as many as fit",
            **setup.ctx.as_dict(),
        }
