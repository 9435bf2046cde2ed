"""Find things in photos, and draw boxes around them; without photos, see how good a detector is on its own set.

References: Redmon et al., 2016, "You only look once"; Redmon and Farhadi, 2018, "YOLOv3" (yolov3_tiny).
Differences from the paper: the weights say by themselves what they are, which classes they know and what they were
trained on.
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
from cvlab.experiments.base import Experiment
from cvlab.experiments.common import photo_batches, weights
from cvlab.experiments.common.photo_batches import ImagesConfig
from cvlab.experiments.detection import inference
from cvlab.runs.run_dir import RunDir


class DetectConfig(ImagesConfig):
    """Which photos, which detector, and what is taken for a find."""

    images: tuple[str, ...] = Field(
        (photos.SAMPLE,), description="files, folders, patterns; none: its validation photos"
    )
    model: Literal["auto", "yolo", "faster_rcnn", "yolov3_tiny"] = Field(
        "auto", description="auto: yolov3_tiny where its weights are on the disk, else yolo"
    )
    weights: str | None = Field(None, description="a run that trained a detector, or its file; null: what comes along")
    conf: schema.Fraction = Field(0.25, description="leave out what is less sure")
    iou: schema.Fraction = Field(0.5, description="of two boxes of a class that overlap more, the surer stays")
    save: tuple[Literal["json", "txt", "xml"], ...] = Field(
        (), description="also write the boxes: COCO's JSON, YOLO's txt, PASCAL VOC's XML"
    )

    explain: Literal["grid", "anchors", "targets", "proposals"] | None = Field(
        None, description="also draw how the course's grid of 7 x 7 cells sees the photo; or a first stage's regions"
    )

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_batches.absolute(names) if names else names

    @field_validator("weights")
    @classmethod
    def _absolute_weights(cls, name: str | None) -> str | None:
        return weights.absolute(name)


def _finder(config: DetectConfig, ctx: device.ComputeContext) -> inference.Finder:
    finder = inference.open_finder(config.model, config.weights, ctx, evaluates=not config.images)
    if config.explain == "proposals" and finder.propose is None:
        raise ConfigError("this detector has no first stage that proposes regions", "--model faster_rcnn has one")
    return finder


class DetectExperiment(Experiment[DetectConfig]):
    """Find things in photos, and draw boxes around them; without photos, see how good a detector is on its own set."""

    name = "detect"
    Config = DetectConfig
    metrics = (
        Metric("num_photos"),
        Metric("num_objects", when=lambda config: bool(config.images)),
        Metric("map50", "fraction", "higher", lambda config: not config.images),
        Metric("map50_95", "fraction", "higher", lambda config: not config.images),
    )

    def run(self, config: DetectConfig, run: RunDir) -> dict[str, float]:
        """Look at all photos; or evaluate."""
        ctx = device.select_device(config.device, config.precision, config.threads)
        finder = _finder(config, ctx)
        run.log(f"looking with {finder.told}")
        run.folder("images")
        if not config.images:
            return inference.evaluate(finder, config, run)
        rows = photo_batches.run(config, run, inference.Detect(config, finder, run), "detect", inference.COLUMNS)
        inference.save_coco(config, finder, rows, run)
        return {"num_photos": len(rows), "num_objects": sum(len(row.values["objects"]) for row in rows)}

    def plan(self, config: DetectConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do. DataError where the weights or all of the photos are not there."""
        ctx = device.select_device(config.device, config.precision, config.threads)
        finder = _finder(config, ctx)
        return {
            "photos": len(photo_batches.resolve_images(config.images)[1]) if config.images else "its validation photos",
            "detector": finder.told,
            "classes": len(finder.classes),
            "parameters": finder.num_parameters,
            **ctx.as_dict(),
        }
