"""Configurations of detection: training a detector, detecting objects in photos."""

import os
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BeforeValidator, Field, field_validator, model_validator

from cvlab.config import schema
from cvlab.data import photo_paths, videos
from cvlab.experiments.common import backbone_config, photo_config, weights
from cvlab.experiments.common.photo_config import ImagesConfig
from cvlab.experiments.detection.models import registry as detector_registry

WEIGHTS_FILE = "detector.safetensors"  # in the run directory of a training run
AUTO: Literal["auto"] = "auto"  # a size that is chosen by the data set, see data/sizing.py


class AugmentConfig(schema.FrozenModel):
    """How much random views of a photo differ."""

    zoom: Annotated[float, Ge(1), Le(8)] = Field(1.6, description="scale up or down by up to this factor")
    aspect: Annotated[float, Ge(1), Le(4)] = Field(1.25, description="change the aspect ratio by up to this factor")
    flip: bool = Field(True, description="flip horizontally at random")
    brightness: schema.Fraction = Field(0.25, description="change the brightness by up to this fraction")
    contrast: schema.Fraction = Field(0.25, description="change the contrast by up to this fraction")
    saturation: schema.Fraction = Field(0.4, description="change the saturation by up to this fraction")


class DetectConfig(ImagesConfig):
    """The photos, the detector, and which of its detections count."""

    images: tuple[str, ...] = Field(
        (photo_paths.SAMPLE,), description="files, folders, patterns; none: the detector's validation photos"
    )
    model: Literal["auto", "yolo", "faster_rcnn", "yolov3_tiny"] = Field(
        "auto", description="auto: yolov3_tiny for a weights file of darknet, else yolo"
    )
    weights: str | None = Field(
        None, description="a run that trained a detector, or its weights file; null: bundled weights"
    )
    conf: schema.Fraction | None = Field(
        None, description="detections of lower scores are dropped; null: a threshold that suits the weights"
    )
    iou: schema.Fraction = Field(
        0.5, description="of detections of one class that overlap by more, the highest-scoring one stays"
    )
    classes: tuple[str, ...] = Field((), description="names of the classes to detect; none: all of the detector's")
    tile: Annotated[int, Ge(32), Le(8192)] | Literal["auto"] | None = Field(
        None,
        description="also detect on overlapping tiles of this side in pixels, for small objects in large photos; auto: "
        "the side of the detector's input, or more in photos of more than 8 such tiles in a row",
    )
    save: tuple[Literal["json", "coco", "csv", "txt", "xml", "crop"], ...] = Field(
        (),
        description="also write the boxes: COCO's results, a COCO data set, a table, YOLO's txt, PASCAL VOC's XML; "
        "crop: an image of each detection",
    )
    explain: Literal["grid", "anchors", "targets", "proposals"] | None = Field(
        None,
        description="also draw a diagram: the 7 x 7 grid of EECS 498, its anchors or targets, or proposals",
    )
    explain_box: schema.PositiveInt | None = Field(
        None,
        description="draw which pixels are evidence for this detection of each photo; 1: that with the highest score",
    )
    window: Annotated[schema.PositiveFloat, Le(1)] = Field(
        0.125, description="explain_box: side of a covered square, as a fraction of the photo's longer side"
    )

    source: Annotated[str, BeforeValidator(photo_config.as_text)] | None = Field(
        None, description="in place of photos: a video file, or the number of a camera"
    )
    every: schema.PositiveInt = Field(1, description="of a video, detect in every N-th frame")
    max_frames: schema.PositiveInt | None = Field(None, description="of a video, stop after N of these frames")
    track: bool = Field(True, description="in a video, give an object the same id in all frames")
    track_buffer: Annotated[int, Ge(0), Le(100_000)] = Field(
        30, description="an object that returns after at most N frames without a detection has the same id"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_photos(cls, values: Any) -> Any:
        """Without `images` a configuration with a `source` has no photos, not the sample."""
        if isinstance(values, dict) and values.get("source") is not None:
            return {"images": (), **values}
        return values

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name.lower().endswith(videos.SUFFIXES) and not os.path.isdir(name):
                raise ValueError(f"{name} is a video: give it as source, `cvlab detect --source {name}`")
        return photo_config.absolute_image_paths(names) if names else names

    @field_validator("source")
    @classmethod
    def _absolute_source(cls, name: str | None) -> str | None:
        if name == "":
            raise ValueError("give a video file, or the number of a camera")
        if name is None or videos.is_camera(name) or "://" in name:
            return name
        return os.path.abspath(name)

    @field_validator("weights")
    @classmethod
    def _absolute_weights(cls, name: str | None) -> str | None:
        return weights.absolute_weights_path(name, WEIGHTS_FILE, "a detector")

    @model_validator(mode="after")
    def _check_source(self) -> "DetectConfig":
        if self.source is not None and self.images:
            raise ValueError("source: give photos or a video, not both; `images=[]` leaves the photos out")
        if self.explain_box is not None and not self.images:
            raise ValueError("explain_box: is for photos")
        if self.source is not None and (self.save or self.explain):
            raise ValueError(
                f"{'save' if self.save else 'explain'}: is for photos; tracks.csv has the boxes of a video"
            )
        if self.source is None and (self.every != 1 or self.max_frames or not self.track):
            raise ValueError("every, max_frames and track are for videos: give a source")
        if self.source is None and not self.images and (self.classes or self.tile):
            key = "classes" if self.classes else "tile"
            raise ValueError(f"{key}: is for photos and videos, and none is given")
        return self


class DetectionDataConfig(backbone_config.PhotoDatasetConfig):
    """A detection data set."""

    kind = "boxes"


class DetectorConfig(backbone_config.BackboneTrainConfig):
    """A detector, its data and how it is trained."""

    data: DetectionDataConfig
    model: Annotated[schema.ComponentConfig, detector_registry.TABLE]
    size: Annotated[int, Ge(64), Le(2048)] | Literal["auto"] = Field(
        320, description="side of the square input images in pixels; auto: by the sizes of the boxes"
    )
    finetune_epochs: Annotated[int, Ge(0)] = Field(
        0, description="in the last N epochs the backbone's layers after the highest-resolution map are trained too"
    )
    views: Annotated[int, Ge(0)] | Literal["auto"] = Field(
        16,
        description="random views of each photo whose feature maps are cached; 0: new views in every epoch; "
        "auto: by the number of photos",
    )
    augment: AugmentConfig = Field(AugmentConfig())
    map_rule: Literal["voc07", "voc", "coco"] = Field("voc", description="how precision is averaged over recall")
    score_threshold: schema.Fraction = Field(0.001, description="detections of lower scores are dropped")
    nms_iou: schema.Fraction = Field(
        0.6, description="of detections of one class that overlap by more, the highest-scoring one stays"
    )

    @property
    def final_phase(self) -> tuple[str, int]:
        """The last epochs, in which the backbone is trained too."""
        return "finetune", self.finetune_epochs

    @model_validator(mode="after")
    def _check_finetune_epochs(self) -> "DetectorConfig":
        self.check_final_epochs("finetune_epochs", self.finetune_epochs)
        return self
