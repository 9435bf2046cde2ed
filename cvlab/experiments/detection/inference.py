"""Detectors that look at photos: which there are, what they find, how it is drawn and saved, how good they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cvlab.data import photos
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError, CvlabError, DataError
from cvlab.experiments.common import weights as common_weights
from cvlab.experiments.common.photo_batches import Photo
from cvlab.experiments.detection import diagrams, evaluation, plots
from cvlab.experiments.detection import drawing as drawing
from cvlab.experiments.detection.data import augment, dataset, writers
from cvlab.experiments.detection.data.coco_classes import COCO_CLASSES
from cvlab.experiments.detection.drawing import Labelled
from cvlab.experiments.detection.evaluation import Rules, confused, measure, metrics
from cvlab.experiments.detection.models import registry as detector_registry
from cvlab.experiments.detection.models import yolov3_tiny
from cvlab.models import weights
from cvlab.ops import nms
from cvlab.ops.average_precision import Detections
from cvlab.reports import images as reports_images
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

COMING_ALONG = {  # by --model: what looks at photos, what is judged without any
    "yolo": ("everyday", "scenes"),
    "faster_rcnn": ("faster_rcnn_everyday", "faster_rcnn_scenes"),
}
SHEET_PHOTOS = 12
COLUMNS = (
    Column("objects", "objects"),
    Column("picture", "picture", is_file=True),
    Column("explained", "diagram", is_file=True),
    Column("txt", "YOLO txt", is_file=True),
    Column("xml", "VOC XML", is_file=True),
)
Look = Callable[[Sequence[Image.Image], float, float], list[Detections]]
Propose = Callable[[Image.Image], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Finder:
    """A detector ready to look: `look(photos, floor, iou)` gives what it finds, in pixels of each photo.

    `told` says which it is; `trained_on` names the set whose validation photos it is judged by. One of two stages has
    `propose(photo)`: the regions (K, 4) of the first, before and after suppression.
    """

    told: str
    classes: tuple[str, ...]
    num_parameters: int
    look: Look
    trained_on: str = ""
    path: str | None = None
    propose: Propose | None = None


def open_finder(model: str, weights_name: str | None, ctx: ComputeContext, evaluates: bool = False) -> Finder:
    """Open a detector. DataError where its weights are not there.

    `auto` is yolov3_tiny where its weights are on the disk, else what comes along.
    """
    if model == "auto":
        is_darknet = weights_name is not None and weights_name.endswith(".weights")
        on_disk = weights_name is None and not evaluates and _has_tiny()
        model = yolov3_tiny.NAME if is_darknet or on_disk else "yolo"
    if model == yolov3_tiny.NAME:
        return _open_tiny(weights_name, ctx)
    if weights_name is None:
        name = COMING_ALONG[model][evaluates]
        path, told = common_weights.BUNDLED_WEIGHTS / f"{name}.safetensors", f"{name}, the weights that come along"
    else:
        path = common_weights.resolve_weights_path(weights_name, detector_registry.FILE, "detector")
        told = str(path)
    made = detector_registry.load(path, ctx.device)
    about = made.about
    is_two = detector_registry.has_two_stages(about.model)
    if model == "faster_rcnn" and not is_two:
        raise ConfigError(f"{path}: {about.model} is no faster_rcnn", "--model yolo takes it")
    text = f"{about.model} ({told}): {len(about.classes)} classes, {about.size_px} px, trained on {about.trained_on}"
    size = sum(p.numel() for p in made.head.parameters())
    return Finder(
        text,
        about.classes,
        size,
        looks(made, ctx),
        about.trained_on,
        about.notes.get("path"),
        _proposes(made, ctx) if is_two else None,
    )


def _has_tiny() -> bool:
    try:
        weights.find_pinned(yolov3_tiny.NAME, None)
    except CvlabError:
        return False
    return True


def _head(
    made: detector_registry.Detector,
    images: Sequence[Image.Image],
    places: Sequence[augment.Drawn],
    ctx: ComputeContext,
) -> Any:
    """Return what a detector's head says of photos, drawn as `places` tell."""
    batch = torch.stack([photos.to_tensor(place.view(image)) for place, image in zip(places, images, strict=True)])
    maps = made.features.batch(batch.to(ctx.device))
    return made.head([maps[name] for name in made.features.names])


def looks(made: detector_registry.Detector, ctx: ComputeContext) -> Look:
    """Return how a detector looks at photos: above a floor of score, without doubles above an IoU, in their pixels."""
    size_px = made.about.size_px

    @torch.inference_mode()
    def look(images: Sequence[Image.Image], floor: float, iou: float) -> list[Detections]:
        places = [augment.whole(image.width, image.height, size_px) for image in images]
        with ctx.autocast():
            found = _head(made, images, places, ctx)
            results: list[Detections] = made.head.detections(  # type: ignore[operator]
                found, size_px, floor, iou, evaluation.MOST
            )
        triples = zip(results, places, images, strict=True)
        return [evaluation.in_photo(result, place, image.size) for result, place, image in triples]

    return look


def _proposes(made: detector_registry.Detector, ctx: ComputeContext) -> Propose:
    size_px = made.about.size_px

    @torch.inference_mode()
    def propose(image: Image.Image) -> tuple[Tensor, Tensor]:
        place = augment.whole(image.width, image.height, size_px)
        with ctx.autocast():
            found = _head(made, [image], [place], ctx)
            before, after = made.head.regions_of(found)[0]  # type: ignore[operator]
        return place.back(before.float().cpu()), place.back(after.float().cpu())

    return propose


def _open_tiny(weights_file: str | None, ctx: ComputeContext) -> Finder:
    net = yolov3_tiny.build(weights_file, ctx.device)

    @torch.inference_mode()
    def look(images: Sequence[Image.Image], floor: float, iou: float) -> list[Detections]:
        boxed = [yolov3_tiny.letterbox(image) for image in images]
        with ctx.autocast():
            found = yolov3_tiny.detect(net, torch.stack([box[0] for box in boxed]).to(ctx.device), floor)
        results = []
        for (box, score, label), (_, scale, left, top), image in zip(found, boxed, images, strict=True):
            kept = nms.batched_nms(box, score, label, iou, evaluation.MOST)
            moved = yolov3_tiny.unletterbox(box[kept].cpu(), scale, left, top)
            most = moved.new_tensor([image.width, image.height] * 2)
            results.append(Detections(moved.clamp(min=0).minimum(most), score[kept].cpu(), label[kept].cpu()))
        return results

    told = f"{yolov3_tiny.NAME}: {len(COCO_CLASSES)} classes, {yolov3_tiny.SIZE_PX} px, trained on COCO"
    return Finder(told, COCO_CLASSES, sum(p.numel() for p in net.parameters()), look)


class Detect:
    """The work of a command on photos: find, draw, save."""

    def __init__(self, config: Any, finder: Finder, out: RunDir) -> None:
        self.config, self.finder, self.out = config, finder, out

    def __call__(self, batch: list[Photo], check_interrupt: Callable[[], None]) -> list[PhotoResult]:
        """Return a result for each photo: `objects`, the surest first, and the picture with their boxes."""
        check_interrupt()
        found = self.finder.look([photo.image for photo in batch], self.config.conf, self.config.iou)
        return [self._one(photo, result) for photo, result in zip(batch, found, strict=True)]

    def _one(self, photo: Photo, found: Detections) -> PhotoResult:
        name = f"images/{photo.label}-boxes.png"
        self.out.write_bytes(name, reports_images.png(drawing.draw(photo.image, labelled(found, self.finder.classes))))
        size = photo.image.size
        names = [self.finder.classes[label] for label in found.labels.tolist()]
        texts = {
            "txt": lambda: writers.write_yolo_txt(found.boxes_xyxy, found.labels, size, found.scores),
            "xml": lambda: writers.write_voc_xml(
                found.boxes_xyxy, names, size, photo.path.name, scores=found.scores.tolist()
            ),
        }
        saved = {}
        for kind in self.config.save:
            if kind in texts:
                self.out.folder("boxes")
                saved[kind] = f"boxes/{photo.label}.{kind}"
                self.out.write_text(saved[kind], texts[kind]())
        if self.config.explain:
            saved["explained"] = f"images/{photo.label}-{self.config.explain}.png"
            self.out.write_bytes(saved["explained"], reports_images.png(self._explained(photo, found, names)))
        triples = zip(names, found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True)
        objects = [
            {"label": label, "score": score, "box_xyxy": [round(v, 2) for v in box]} for label, score, box in triples
        ]
        width, height = size
        values = {"objects": objects, "width": width, "height": height}
        return PhotoResult(str(photo.path), values, {"picture": name, **saved})

    def _explained(self, photo: Photo, found: Detections, names: Sequence[str]) -> Image.Image:
        kind = self.config.explain
        if kind == diagrams.PROPOSALS:
            assert self.finder.propose is not None
            return diagrams.proposals(photo.image, *self.finder.propose(photo.image))
        boxes_xyxy, words = diagrams.annotated(photo.path) or (found.boxes_xyxy, names)
        return diagrams.draw(kind, photo.image, boxes_xyxy, words)


def labelled(found: Detections, classes: Sequence[str]) -> list[Labelled]:
    """Return what is drawn of detections."""
    triples = zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [Labelled(tuple(box), f"{classes[label]} {score:.2f}", label) for box, score, label in triples]


def save_coco(config: Any, finder: Finder, rows: Sequence[PhotoResult], out: RunDir) -> None:
    """Write one JSON for all photos, where it is asked for."""
    if "json" not in config.save:
        return
    index = {name: k for k, name in enumerate(finder.classes)}
    boxed = [
        writers.Boxed(
            Path(row.image).name,
            (row.values["width"], row.values["height"]),
            torch.tensor([thing["box_xyxy"] for thing in row.values["objects"]]).view(-1, 4),
            torch.tensor([index[thing["label"]] for thing in row.values["objects"]], dtype=torch.int64),
            torch.tensor([thing["score"] for thing in row.values["objects"]]),
        )
        for row in rows
    ]
    out.folder("boxes")
    out.write_text("boxes/detections.json", writers.write_coco_json(boxed, finder.classes))


pass  # REMOVED IMPORT


EVALUATION_FLOOR, EVALUATION_IOU = 0.001, 0.6


def evaluate(finder: Finder, config: Any, out: RunDir) -> dict[str, float]:
    """Judge a detector by the validation photos of its own set; draw the first of them on a sheet."""
    if not finder.trained_on:
        raise DataError("this detector has no validation photos here", "name photos to look at")
    boxset = dataset.load(finder.trained_on, data_root(), finder.path)
    if tuple(boxset.classes) != tuple(finder.classes):
        raise DataError(f"{finder.trained_on}: its classes are not those that the detector was trained on")
    items = boxset.splits["val"]
    rules = Rules("voc", EVALUATION_FLOOR, EVALUATION_IOU)
    found: list[Detections] = []
    sheet: list[Image.Image] = []
    for start in range(0, len(items), config.batch_size):
        some = items[start : start + config.batch_size]
        images = [photos.load(item.path) for item in some]
        results = finder.look(images, rules.floor, rules.nms_iou)
        found += results
        for item, image, result in list(zip(some, images, results, strict=True))[: SHEET_PHOTOS - len(sheet)]:
            sure = result.scores >= config.conf
            shown = Detections(result.boxes_xyxy[sure], result.scores[sure], result.labels[sure])
            wanted = [tuple(box) for box in item.boxes_xyxy.tolist()]
            sheet.append(drawing.draw(image, labelled(shown, finder.classes), wanted))
    out.write_bytes("images/sheet.png", reports_images.png(drawing.contact_sheet(sheet)))
    measured = measure(found, items, len(finder.classes), rules)
    plots.write(out, measured, confused(found, items, len(finder.classes), config.conf), finder.classes)
    out.extra_summary |= {"map_rule": rules.map_rule, "confidence_floor": rules.floor, "data": f"{boxset.name}, val"}
    out.extra_summary |= summarize([PhotoResult("images/sheet.png", files={"picture": "images/sheet.png"})], COLUMNS)
    return {"num_photos": len(items), **metrics(measured, finder.classes)}
