"""Which pixels are evidence for a detection: its D-RISE score, while squares are covered one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cvlab.errors import ConfigError
from cvlab.experiments.common import occlusion
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.experiments.detection import drawing
from cvlab.experiments.detection.drawing import LabeledBox
from cvlab.experiments.detection.inference import PhotoDetector
from cvlab.ops import boxes
from cvlab.ops.average_precision import Detections
from cvlab.reports import images as reports_images
from cvlab.runs.results import PhotoResult

MIN_SCORE = 0.01  # of detections in a covered photo that are compared with the explained one
BATCH_SIZE = 8


class DetectionExplainer:
    """Detects objects in batches of photos as `PhotoDetector` does, and explains one detection of each.

    The score of a photo is the largest product of score and IoU with the explained box, over the detections of its
    class.

    Args:
        photo_detector: Detects, draws and saves.
        number: Number of the detection to explain, from 1.
        window: Side of the covered square, as a fraction of the photo's longer side.
    """

    def __init__(self, photo_detector: PhotoDetector, number: int, window: float) -> None:
        self.photo_detector, self.number, self.window = photo_detector, number, window

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Return the results of the detector, with `explanation` and a panel, `evidence`, of that detection."""
        out = self.photo_detector.out
        results = self.photo_detector(batch, check_interrupt)
        for photo, result in zip(batch, results, strict=True):
            objects = result.values["objects"]
            if self.number > len(objects):
                out.log(f"warning: {photo.path.name} has {_count(objects)}, none with number {self.number}")
                continue
            values, panel = self._explain(photo, objects[self.number - 1], check_interrupt)
            result.values["explanation"] = values
            result.files["evidence"] = f"images/{photo.label}-evidence.png"
            out.write_bytes(result.files["evidence"], reports_images.png(panel))
        return results

    def _explain(
        self, photo: Photo, obj: dict[str, Any], check_interrupt: CheckInterrupt
    ) -> tuple[dict[str, Any], Image.Image]:
        """Return what is said about the explanation of an object, and a panel."""
        detector, name = self.photo_detector.detector, obj["label"]
        box_xyxy, label = torch.tensor(obj["box_xyxy"]), detector.classes.index(name)

        def scores(images: Sequence[Image.Image]) -> Tensor:
            predictions = detector.predict(images, MIN_SCORE, self.photo_detector.nms_iou)
            return torch.stack([match_score(prediction, box_xyxy, label) for prediction in predictions])

        values = occlusion.occlusion_map(scores, photo.image, self.window, BATCH_SIZE, check_interrupt).clamp(min=0)
        inside = _fraction_inside(values, box_xyxy, photo)
        box = LabeledBox(tuple(obj["box_xyxy"]), f"{name} {obj['score']:.2f}", label)
        marked = (f"detection {self.number}", drawing.draw(photo.image, [box]))
        caption = f"evidence, {inside:.0%} of it inside the box"
        title = f"evidence for detection {self.number}, {name}: {photo.path.name}"
        about = {"number": self.number, "label": name, "score": obj["score"], "inside_box": inside}
        return about, occlusion.draw(photo.image, marked, values, caption, title)


def require_any(results: Sequence[PhotoResult], number: int) -> None:
    """Raise ConfigError if no photo has a detection with a number."""
    if not any("evidence" in result.files for result in results):
        max_count = max(len(result.values["objects"]) for result in results)
        if not max_count:
            raise ConfigError("no objects were detected, so there is nothing to explain", "lower conf")
        text = f"no detection has number {number}: a photo has at most {max_count}"
        raise ConfigError(text, "give a lower number, or lower conf")


def _count(objects: Sequence[Any]) -> str:
    return f"{len(objects)} detection{'s' * (len(objects) != 1)}"


def match_score(detections: Detections, box_xyxy: Tensor, label: int) -> Tensor:
    """Return the largest score times IoU with a box (4,), over the detections of a class; a scalar, 0 if none."""
    is_same = detections.labels == label
    overlap = boxes.iou(detections.boxes_xyxy[is_same], box_xyxy[None])[:, 0]
    return (detections.scores[is_same] * overlap).max() if len(overlap) else detections.scores.new_zeros(())


def _fraction_inside(values: Tensor, box_xyxy: Tensor, photo: Photo) -> float:
    """Return the fraction of a map's sum that is inside a box of the photo."""
    height, width = values.shape
    scale = box_xyxy.new_tensor([width / photo.image.width, height / photo.image.height] * 2)
    left, top, right, bottom = (box_xyxy * scale).round().int().tolist()
    return float(values[top:bottom, left:right].sum() / values.sum().clamp(min=1e-30))
