"""Detect objects in photos and draw their boxes; without photos, evaluate the detector on its validation split.

References: Redmon et al., 2016, "You only look once"; Redmon and Farhadi, 2018, "YOLOv3" (yolov3_tiny).
Differences from the paper: a weights file says which detector it belongs to, its classes and what it was trained on.
Metrics: `num_photos`, `num_objects`; without photos `map50`, `map50_95` and `ap50/CLASS` on the validation photos.
Command: cvlab detect photo.jpg
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import photos
from cvlab.engine import device
from cvlab.errors import ConfigError
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.common import photo_batches, photo_config, weights
from cvlab.experiments.common.photo_config import ImagesConfig
from cvlab.experiments.detection import diagrams, evaluation, inference
from cvlab.experiments.detection.inference import LoadedDetector, PhotoDetector
from cvlab.runs.run_dir import RunDir


class DetectConfig(ImagesConfig):
    """The photos, the detector, and which of its detections count."""

    images: tuple[str, ...] = Field(
        (photos.SAMPLE,), description="files, folders, patterns; none: the detector's validation photos"
    )
    model: Literal["auto", "yolo", "faster_rcnn", "yolov3_tiny"] = Field(
        "auto", description="auto: yolov3_tiny if its weights are on the disk, else yolo"
    )
    weights: str | None = Field(
        None, description="a run that trained a detector, or its weights file; null: bundled weights"
    )
    conf: schema.Fraction = Field(0.25, description="detections of lower scores are dropped")
    iou: schema.Fraction = Field(
        0.5, description="of detections of one class that overlap by more, the highest-scoring one stays"
    )
    save: tuple[Literal["json", "txt", "xml"], ...] = Field(
        (), description="also write the boxes: COCO's JSON, YOLO's txt, PASCAL VOC's XML"
    )
    explain: Literal["grid", "anchors", "targets", "proposals"] | None = Field(
        None,
        description="also draw a diagram: the 7 x 7 grid of EECS 498, its anchors or targets, or proposals",
    )

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_config.absolute_image_paths(names) if names else names

    @field_validator("weights")
    @classmethod
    def _absolute_weights(cls, name: str | None) -> str | None:
        return weights.absolute_weights_path(name)


def _load_detector(config: DetectConfig, ctx: device.ComputeContext) -> LoadedDetector:
    detector = inference.load_detector(config.model, config.weights, ctx, for_evaluation=not config.images)
    if config.explain == diagrams.PROPOSALS and detector.propose is None:
        raise ConfigError("this detector has no first stage that proposes regions", "--model faster_rcnn has one")
    return detector


class DetectExperiment(PhotoExperiment[DetectConfig]):
    """Detect objects in photos and draw their boxes; without photos, evaluate the detector on its validation split."""

    name = "detect"
    Config = DetectConfig
    columns = inference.COLUMNS
    metrics = (
        Metric("num_photos"),
        Metric("num_objects", when=lambda config: bool(config.images)),
        Metric("map50", "fraction", "higher", lambda config: not config.images),
        Metric("map50_95", "fraction", "higher", lambda config: not config.images),
    )

    def run(self, config: DetectConfig, run: RunDir) -> dict[str, float]:
        """Detect objects in all photos, or evaluate the detector."""
        ctx = device.select_device(config.device, config.precision, config.threads)
        detector = _load_detector(config, ctx)
        run.log(f"detecting with {detector.description}")
        run.folder("images")
        if not config.images:
            return evaluation.evaluate_on_validation(detector, run, config.batch_size, config.conf)
        work = PhotoDetector(detector, run, config.conf, config.iou, config.save, config.explain)
        results = photo_batches.run(config, run, work, "detect", self.columns)
        if "json" in config.save:
            inference.save_coco(detector, results, run)
        num_objects = sum(len(result.values["objects"]) for result in results)
        return {"num_photos": len(results), "num_objects": num_objects}

    def plan(self, config: DetectConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. DataError if the weights or all of the photos are missing."""
        ctx = device.select_device(config.device, config.precision, config.threads)
        detector = _load_detector(config, ctx)
        return {
            "photos": len(photo_batches.resolve_images(config.images)[1]) if config.images else "its validation photos",
            "detector": detector.description,
            "classes": len(detector.classes),
            "parameters": detector.num_parameters,
            **ctx.as_dict(),
        }
