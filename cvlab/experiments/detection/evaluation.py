"""Detections of a whole data set, and how good they are: average precision, confusion matrix, recall by size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvlab.data import photos
from cvlab.engine.device import ComputeContext
from cvlab.errors import DataError
from cvlab.experiments.detection import drawing, inference, plots
from cvlab.experiments.detection.data import dataset
from cvlab.experiments.detection.data.dataset import DetectionDatasetSource, DetectionSample
from cvlab.experiments.detection.feature_cache import FeatureCache
from cvlab.experiments.detection.inference import LoadedDetector
from cvlab.experiments.detection.models.base import DetectionHead
from cvlab.ops import average_precision
from cvlab.ops.average_precision import DetectionMetrics, Detections, GroundTruth
from cvlab.reports import images as reports_images
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

if TYPE_CHECKING:
    from PIL import Image

BATCH_SIZE = 16
SHEET = "images/sheet.png"
SHEET_PHOTOS = 12
BETA = 0.5  # of the F score by which a threshold is chosen
THRESHOLDS = tuple(k / 20 for k in range(1, 19))  # of scores, 0.05 to 0.9


@dataclass(frozen=True)
class EvaluationRules:
    """How detections are postprocessed and evaluated.

    `map_rule` is one of `average_precision.RULES`; the others are arguments of `DetectionHead.postprocess`.
    """

    map_rule: str = "voc"
    score_threshold: float = 0.001
    nms_iou: float = 0.6


@torch.inference_mode()
def predict_cached(
    head: DetectionHead[Any], cache: FeatureCache, size_px: int, rules: EvaluationRules, ctx: ComputeContext
) -> list[Detections]:
    """Return the detections in photos whose feature maps are cached, in pixels of the photos, on the CPU."""
    was_training = head.training
    head.eval()
    results: list[Detections] = []
    for start in range(0, len(cache), BATCH_SIZE):
        indices = torch.arange(start, min(start + BATCH_SIZE, len(cache)))
        maps, _ = cache.batch(indices)
        with ctx.autocast():
            in_views = head.postprocess(
                head(maps), size_px, rules.score_threshold, rules.nms_iou, inference.MAX_DETECTIONS
            )
        for k, detections in zip(indices.tolist(), in_views, strict=True):
            view = cache.views[k]
            results.append(inference.to_photo_coordinates(detections, view.transform, view.photo_size))
    head.train(was_training)
    return results


def ground_truths(samples: Sequence[DetectionSample]) -> list[GroundTruth]:
    """Return the ground truth of each sample."""
    return [GroundTruth(sample.boxes_xyxy, sample.labels, sample.difficult, sample.crowd) for sample in samples]


def compute_metrics(
    detections: Sequence[Detections], samples: Sequence[DetectionSample], num_classes: int, rules: EvaluationRules
) -> DetectionMetrics:
    """Compute the average precision over a data set."""
    return average_precision.evaluate(detections, ground_truths(samples), num_classes, rules.map_rule)


def reported_metrics(metrics: DetectionMetrics, classes: Sequence[str]) -> dict[str, float]:
    """Return the metrics that a run reports; those that are undefined, without ground truth, are left out."""
    by_class = {f"ap50/{name}": value for name, value in zip(classes, metrics.ap50.tolist(), strict=True)}
    values = {"map50": metrics.map50, "map50_95": metrics.map50_95, **by_class}
    return {name: value for name, value in values.items() if value == value}


def confusion_matrix(
    detections: Sequence[Detections], samples: Sequence[DetectionSample], num_classes: int, score_threshold: float
) -> Tensor:
    """Count ground truth against detections of at least `score_threshold`: int64 (C + 1, C + 1), background last."""
    return average_precision.confusion_matrix(detections, ground_truths(samples), num_classes, score_threshold)


def best_score_threshold(detections: Sequence[Detections], samples: Sequence[DetectionSample]) -> float | None:
    """Return the score threshold of THRESHOLDS with the highest F0.5 over the boxes of all classes; None without boxes.

    F0.5 (van Rijsbergen, 1979) weights precision more than recall: people see a wrong box at once, a missing one later.
    Boxes are matched as in `confusion_matrix`.
    """
    scores, is_correct, num_boxes = [], [], 0
    for detected, true in zip(detections, ground_truths(samples), strict=True):
        box = average_precision.match_any_class(detected, true, THRESHOLDS[0])
        is_counted, is_matched = box != average_precision.IGNORED, box >= 0
        matches_class = torch.zeros_like(is_matched)
        matches_class[is_matched] = detected.labels[is_matched] == true.labels[box[is_matched]]
        scores.append(detected.scores[is_counted])
        is_correct.append(matches_class[is_counted])
        num_boxes += int((~true.is_ignored).sum())
    all_scores, all_correct = torch.cat(scores), torch.cat(is_correct)
    best: tuple[float, float | None] = (0.0, None)
    for threshold in THRESHOLDS:
        is_above = all_scores >= threshold
        num_correct, num_detections = int(all_correct[is_above].sum()), int(is_above.sum())
        f_score = (1 + BETA**2) * num_correct / max(BETA**2 * num_boxes + num_detections, 1)
        best = max(best, (f_score, threshold), key=lambda pair: pair[0])
    return best[1]


def recall_by_size(
    detections: Sequence[Detections], samples: Sequence[DetectionSample], score_threshold: float
) -> dict[str, float]:
    """Return the recall for each size of box that occurs, as metrics `recall_SIZE`."""
    recalls = average_precision.recall_by_size(detections, ground_truths(samples), score_threshold)
    return {f"recall_{size}": recall for size, recall in recalls.items() if recall == recall}


def evaluate_on_validation(
    detector: LoadedDetector, out: RunDir, batch_size: int, score_threshold: float
) -> dict[str, float]:
    """Evaluate a detector on the validation photos of its data set; draw the first of them on a contact sheet.

    Only detections of at least `score_threshold` are drawn, and counted in the confusion matrix.
    """
    if not detector.trained_on:
        raise DataError("this detector has no validation photos", "name photos to detect objects in")
    if detector.trained_on == DetectionDatasetSource.kind:  # its folder is in the configuration of the training run
        raise DataError(
            "this detector was trained on photos of your own, which its weights do not name",
            "`cvlab eval RUN` evaluates a training run on them; or name photos to detect in",
        )
    box_dataset = dataset.load(detector.trained_on, data_root())
    if tuple(box_dataset.classes) != tuple(detector.classes):
        raise DataError(f"{detector.trained_on}: its classes are not those that the detector was trained on")
    samples = box_dataset.splits["val"]
    rules = EvaluationRules()
    predictions: list[Detections] = []
    sheet: list[Image.Image] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        images = [photos.load(sample.path) for sample in batch]
        results = detector.predict(images, rules.score_threshold, rules.nms_iou)
        predictions += results
        for sample, image, result in list(zip(batch, images, results, strict=True))[: SHEET_PHOTOS - len(sheet)]:
            above = result.scores >= score_threshold
            shown = Detections(result.boxes_xyxy[above], result.scores[above], result.labels[above])
            gt_boxes = [tuple(box) for box in sample.boxes_xyxy.tolist()]
            sheet.append(drawing.draw(image, inference.labeled_boxes(shown, detector.classes), gt_boxes))
    title = f"the first {len(sheet)} of {len(samples)} validation photos of {box_dataset.name}: {out.path.name}"
    out.write_bytes(SHEET, reports_images.png(drawing.contact_sheet(sheet, title, has_ground_truth=True)))
    metrics = compute_metrics(predictions, samples, len(detector.classes), rules)
    confusion = confusion_matrix(predictions, samples, len(detector.classes), score_threshold)
    plots.write(out, metrics, confusion, detector.classes)
    out.extra_summary |= {
        "map_rule": rules.map_rule,
        "score_threshold": rules.score_threshold,
        "data": f"{box_dataset.name}, val",
    }
    return {"num_photos": len(samples), **reported_metrics(metrics, detector.classes)}
