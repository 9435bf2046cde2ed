"""A trained detector for images in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cvlab.data import photos
from cvlab.engine import device as engine_device
from cvlab.experiments.common import weights
from cvlab.experiments.detection import inference
from cvlab.experiments.detection.config import WEIGHTS_FILE, DetectConfig
from cvlab.experiments.detection.models import detector as detector_model
from cvlab.experiments.detection.models.detector import Detector, DetectorGraph
from cvlab.models.photo_module import PhotoModule, require_batch
from cvlab.ops.average_precision import Detections

DEFAULTS = DetectConfig.model_fields  # of `cvlab detect`


class DetectorModule(PhotoModule):
    """A detector of objects in images of any size: resize, normalization, model, non-maximum suppression.

    Images are rounded to 8 bits, as photos are, so that it is not differentiable.

    Attributes:
        score_threshold: Detections with a lower score are left out.
        nms_iou: Nms iou of detections of one class that overlap by more, the highest-scoring one stays.
    """

    def __init__(self, detector: Detector, ctx: engine_device.ComputeContext) -> None:
        super().__init__()
        self.graph = DetectorGraph(detector)
        self.classes = detector.metadata.classes
        self.score_threshold = float(detector.metadata.notes.get("score_threshold", inference.DEFAULT_SCORE_THRESHOLD))
        self.nms_iou = float(DEFAULTS["iou"].default)
        self.predictor = inference.make_predictor(detector, ctx)

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """Return the detections in RGB photos, in their pixels."""
        return self.predictor(images, self.score_threshold, self.nms_iou)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return for each of the images (N, 3, H, W) its `boxes` (K, 4), `scores` (K,) and `labels` (K,), on the CPU.

        Boxes are xyxy in pixels of the image, labels are indices of `classes`, as torchvision's detectors have them,
        but without a class for the background.
        """
        detections = self.detect([photos.to_image(image) for image in require_batch(images)])
        return [{"boxes": each.boxes_xyxy, "scores": each.scores, "labels": each.labels} for each in detections]

    def predict_batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return the `objects` of each photo, highest score first, and its `width` and `height`."""
        return [
            {
                "objects": inference.describe_objects(detections, self.classes),
                "width": image.width,
                "height": image.height,
            }
            for image, detections in zip(images, self.detect(images), strict=True)
        ]


def load(base: Path, device: str) -> DetectorModule:
    """Return the detector of a completed run. Raises DataError if the run has none."""
    ctx = engine_device.select_device(device, DEFAULTS["precision"].default)
    path = weights.resolve_weights_path(str(base), WEIGHTS_FILE, "detector")
    module = DetectorModule(detector_model.load(path, ctx.device), ctx)
    return module.eval().requires_grad_(False)


def load_bundled(name: str, ctx: engine_device.ComputeContext, score_threshold: float) -> DetectorModule:
    """Return a bundled detector with a score threshold of its own; see `DetectsObjects.bundled_detector`."""
    path = weights.BUNDLED_WEIGHTS / f"{name}.safetensors"
    module = DetectorModule(detector_model.load(path, ctx.device), ctx)
    module.score_threshold = score_threshold
    return module.eval().requires_grad_(False)
