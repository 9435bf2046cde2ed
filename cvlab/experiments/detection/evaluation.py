"""What a detector finds in the photos of a set, and how good that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvlab.engine.device import ComputeContext
from cvlab.experiments.detection.data import augment
from cvlab.experiments.detection.data.dataset import DetectionSample
from cvlab.experiments.detection.feature_cache import Cached
from cvlab.ops import average_precision
from cvlab.ops.average_precision import DetectionMetrics, Detections, GroundTruth

MOST = 100  # detections of a photo, as COCO counts them
BATCH = 16


@dataclass(frozen=True)
class Rules:
    """How detections are made and counted."""

    map_rule: str
    floor: float
    nms_iou: float


@torch.inference_mode()
def find(head: nn.Module, cached: Cached, size_px: int, rules: Rules, ctx: ComputeContext) -> list[Detections]:
    """Return what a detector finds in photos whose maps are at hand, in pixels of the photos, on the CPU."""
    was_training = head.training
    head.eval()
    results: list[Detections] = []
    for start in range(0, len(cached), BATCH):
        indices = torch.arange(start, min(start + BATCH, len(cached)))
        maps, _ = cached.batch(indices)
        with ctx.autocast():
            views_found = head.detections(head(maps), size_px, rules.floor, rules.nms_iou, MOST)  # type: ignore[operator]
        results += [
            in_photo(view, cached.places[k], cached.sizes[k])
            for k, view in zip(indices.tolist(), views_found, strict=True)
        ]
    head.train(was_training)
    return results


def in_photo(found: Detections, place: augment.Drawn, size: tuple[int, int]) -> Detections:
    """Move what is found in a view to the photo it was drawn from, (width, height) pixels large; on the CPU."""
    moved = place.back(found.boxes_xyxy.float().cpu())
    width, height = size
    moved = moved.clamp(min=0).minimum(moved.new_tensor([width, height, width, height]))
    return Detections(moved, found.scores.float().cpu(), found.labels.cpu())


def truths(items: Sequence[DetectionSample]) -> list[GroundTruth]:
    """Return the boxes that photos have."""
    return [GroundTruth(item.boxes_xyxy, item.labels, item.difficult) for item in items]


def measure(
    found: Sequence[Detections], items: Sequence[DetectionSample], num_classes: int, rules: Rules
) -> DetectionMetrics:
    """Return the average precision over a set by the rule."""
    return average_precision.evaluate(found, truths(items), num_classes, rules.map_rule)


def metrics(found: DetectionMetrics, classes: Sequence[str]) -> dict[str, float]:
    """Return what a run reports of a set; classes that the set has none of are left out."""
    by_class = {f"ap50/{name}": value for name, value in zip(classes, found.ap50.tolist(), strict=True)}
    return {"map50": found.map50, "map50_95": found.map50_95} | {k: v for k, v in by_class.items() if v == v}


def confused(found: Sequence[Detections], items: Sequence[DetectionSample], num_classes: int, floor: float) -> Tensor:
    """Count what is taken for what among detections of at least `floor`: int64 (C + 1, C + 1)."""
    return average_precision.confusion_matrix(found, truths(items), num_classes, floor)


def recalls(found: Sequence[Detections], items: Sequence[DetectionSample], floor: float) -> dict[str, float]:
    """Return the share of boxes that are found, by their size, where there are some of a size."""
    shares = average_precision.recall_by_size(found, truths(items), floor)
    return {f"recall_{size}": share for size, share in shares.items() if share == share}
