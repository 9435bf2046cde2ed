"""Detectors by name."""

from typing import TYPE_CHECKING, Any

from cvlab import registry
from cvlab.config.schema import Registry

if TYPE_CHECKING:
    from cvlab.experiments.detection.models.base import DetectionHead


DETECTORS = {
    "nanodet": "cvlab.experiments.detection.models.nanodet:NanoDet",
    "yolo_fpn": "cvlab.experiments.detection.models.yolo_fpn:YoloFpn",
    "faster_rcnn": "cvlab.experiments.detection.models.faster_rcnn:FasterRcnn",
    "faster_rcnn_course": "cvlab.experiments.detection.models.faster_rcnn_course:FasterRcnnCourse",
    "yolo_grid": "cvlab.experiments.detection.models.yolo_grid:YoloGrid",
}
TABLE = Registry("detector", DETECTORS, frozenset({"channels", "num_classes"}))


def head_class(model: str) -> "type[DetectionHead[Any]]":
    """Return the class of the detector called `model`. ConfigError for an unknown name."""
    cls: type[DetectionHead[Any]] = registry.get("detector", model, DETECTORS)
    return cls


def is_two_stage(model: str) -> bool:
    """Whether a detector's first stage proposes regions that its second stage classifies."""
    from cvlab.experiments.detection.models.base import TwoStageHead

    return issubclass(head_class(model), TwoStageHead)
