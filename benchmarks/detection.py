"""Compare the operations of detectors with plain loops, torchvision and torchmetrics; time the bundled detectors.

Command: python benchmarks/detection.py --rounds 3
"""

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab import _compat
from cvlab.bench import harness
from cvlab.data import photo_paths, photos
from cvlab.engine import device as engine_device
from cvlab.experiments.detection import inference
from cvlab.ops import average_precision, nms
from cvlab.ops.average_precision import Detections, GroundTruth
from cvlab.ops.roi_align import roi_align

NMS_COUNTS, NMS_IOU = (5_000, 20_000), 0.5
FEATURE_SHAPE, NUM_BOXES, OUTPUT_SIZE = (4, 1280, 14, 14), 256, 2  # the second stage of the course's detector
NUM_IMAGES, NUM_CLASSES, NUM_DETECTIONS, NUM_OBJECTS = 5_000, 20, 10, 5
PHOTO_PX = (640, 480)
Loops = dict[str, Callable[[], object]]


def run(rounds: int, device: str) -> dict[str, Any]:
    """Return `{"ok", "what", "loops": [{"loop", "seconds", "against_ours"}]}`, other implementations after cvlab's."""
    ctx = engine_device.select_device(device)
    rows = []
    for group in _groups(ctx):
        measured = harness.alternate({name: harness.synchronized(ctx, loop) for name, loop in group.items()}, rounds)
        reference = next(iter(measured.values()))
        for name, seconds in measured.items():
            times = statistics.median(b / a for a, b in zip(reference, seconds, strict=True))
            rows.append({"loop": name, "seconds": statistics.median(seconds), "against_ours": times})
    return {"ok": True, "what": harness.describe(ctx, ctx.precision, rounds), "loops": rows}


def _groups(ctx: engine_device.ComputeContext) -> list[Loops]:
    """Return groups of loops to compare, cvlab's implementation first."""
    suppression = [_nms(count, ctx) for count in NMS_COUNTS]
    detectors = [_detector(name, ctx) for name in inference.BUNDLED_DETECTORS]
    return [*suppression, _roi_align(ctx), _precision(), *detectors]


def _nms(count: int, ctx: engine_device.ComputeContext) -> Loops:
    generator = torch.Generator().manual_seed(0)
    corner, sides = torch.rand(2, count, 2, generator=generator)
    boxes_xyxy = torch.cat([corner, corner + 0.1 * sides + 0.01], 1).to(ctx.device) * 1000
    scores = torch.rand(count, generator=generator).to(ctx.device)
    loops: Loops = {f"nms of {count} boxes": lambda: nms.nms(boxes_xyxy, scores, NMS_IOU)}
    torchvision_nms = _torchvision_op("nms")
    if torchvision_nms is not None:
        loops[f"torchvision's, {count} boxes"] = lambda: torchvision_nms(boxes_xyxy, scores, NMS_IOU)
    return loops


def _torchvision_op(name: str) -> Callable[..., Any] | None:
    """Return one of torchvision's compiled operators; None if its library cannot be loaded."""
    _compat.torchvision()
    has_ops = importlib.import_module("torchvision.extension")._has_ops()
    return getattr(importlib.import_module("torchvision.ops"), name) if has_ops else None


def _roi_align(ctx: engine_device.ComputeContext) -> Loops:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(FEATURE_SHAPE, generator=generator).to(ctx.device, memory_format=torch.channels_last)
    maps.requires_grad_(True)
    corner, sides = torch.rand(2, NUM_BOXES, 2, generator=generator)
    boxes_xyxy = torch.cat([corner, corner + sides], 1).clamp(max=1).to(ctx.device) * FEATURE_SHAPE[2]
    image_indices = (torch.arange(NUM_BOXES) % FEATURE_SHAPE[0]).to(ctx.device)

    def forward_backward(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function().sum(), maps)

    loops: Loops = {
        f"RoIAlign of {NUM_BOXES} boxes, forward and backward": forward_backward(
            lambda: roi_align(maps, boxes_xyxy, image_indices, OUTPUT_SIZE)
        ),
        "a loop over the boxes": forward_backward(lambda: roi_align_loop(maps, boxes_xyxy, image_indices, OUTPUT_SIZE)),
    }
    torchvision_roi_align = _torchvision_op("roi_align")
    if torchvision_roi_align is not None:
        rois = torch.cat([image_indices[:, None].to(boxes_xyxy), boxes_xyxy], 1)
        loops["torchvision's RoIAlign"] = forward_backward(
            lambda: torchvision_roi_align(maps, rois, OUTPUT_SIZE, 1.0, 2, True)
        )
    return loops


def roi_align_loop(maps: Tensor, boxes_xyxy: Tensor, image_indices: Tensor, size: int) -> Tensor:
    """Compute `roi_align` with two samples per bin and axis box by box: four points of each bin, then their mean."""
    h, w = maps.shape[2:]
    bin_samples = (torch.arange(2 * size, dtype=maps.dtype, device=maps.device) + 0.5) / (2 * size)
    pooled = []
    for (x1, y1, x2, y2), k in zip(boxes_xyxy.tolist(), image_indices.tolist(), strict=True):
        x_samples, y_samples = ((low + bin_samples * (high - low)) for low, high in ((x1, x2), (y1, y2)))
        y, x = torch.meshgrid(2 * y_samples / h - 1, 2 * x_samples / w - 1, indexing="ij")
        samples = F.grid_sample(
            maps[k : k + 1], torch.stack([x, y], 2)[None], padding_mode="border", align_corners=False
        )
        pooled.append(F.avg_pool2d(samples, 2))
    return torch.cat(pooled)


def _precision() -> Loops:
    detections, ground_truths = random_detections(NUM_IMAGES)
    loops: Loops = {
        f"average precision, {NUM_IMAGES} images, {NUM_CLASSES} classes": lambda: average_precision.evaluate(
            detections, ground_truths, NUM_CLASSES, "coco"
        )
    }
    if all(importlib.util.find_spec(name) for name in ("torchmetrics", "faster_coco_eval")):
        loops["torchmetrics with faster-coco-eval"] = lambda: _torchmetrics(detections, ground_truths)
    return loops


def random_detections(num_images: int) -> tuple[list[Detections], list[GroundTruth]]:
    """Return random ground truths and random detections near their boxes."""
    generator = torch.Generator().manual_seed(0)
    detections, ground_truths = [], []
    for _ in range(num_images):
        corner = 400 * torch.rand(NUM_OBJECTS, 2, generator=generator)
        boxes_xyxy = torch.cat([corner, corner + 20 + 100 * torch.rand(NUM_OBJECTS, 2, generator=generator)], 1)
        labels = torch.randint(NUM_CLASSES, (NUM_OBJECTS,), generator=generator)
        detected_xyxy = boxes_xyxy.repeat(NUM_DETECTIONS // NUM_OBJECTS, 1) + 10 * torch.randn(
            NUM_DETECTIONS, 4, generator=generator
        )
        detected_xyxy[:, 2:] = detected_xyxy[:, 2:].maximum(detected_xyxy[:, :2] + 1)
        scores = torch.rand(NUM_DETECTIONS, generator=generator)
        detections.append(Detections(detected_xyxy, scores, labels.repeat(NUM_DETECTIONS // NUM_OBJECTS)))
        ground_truths.append(GroundTruth(boxes_xyxy, labels, torch.zeros(NUM_OBJECTS, dtype=torch.bool)))
    return detections, ground_truths


def _torchmetrics(detections: list[Detections], ground_truths: list[GroundTruth]) -> object:
    metric = importlib.import_module("torchmetrics.detection").MeanAveragePrecision(backend="faster_coco_eval")
    metric.update(
        [{"boxes": d.boxes_xyxy, "scores": d.scores, "labels": d.labels} for d in detections],
        [{"boxes": g.boxes_xyxy, "labels": g.labels} for g in ground_truths],
    )
    return metric.compute()


def _detector(model: str, ctx: engine_device.ComputeContext) -> Loops:
    detector = inference.load_detector(model, None, ctx)
    photo = photos.load(photo_paths.find_images([photo_paths.SAMPLE])[0]).resize(PHOTO_PX, Image.Resampling.BICUBIC)
    width, height = PHOTO_PX
    return {f"{model} on a photo of {width} x {height}": lambda: detector.predict([photo], 0.25, 0.5)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = harness.argument_parser(__doc__ or "", rounds=9).parse_args(arguments)
    result = run(options.rounds, options.device)
    rows = [(row["loop"], 1000 * row["seconds"], row["against_ours"]) for row in result["loops"]]
    harness.print_result(result, options.json, ("", "ms (median)", "time relative to cvlab"), rows)


if __name__ == "__main__":
    main()
