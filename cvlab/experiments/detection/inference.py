"""Inference with trained detectors: loading them, prediction on photos, drawings and annotation files."""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cvlab import registry
from cvlab.data import photos
from cvlab.engine.device import ComputeContext, select_device
from cvlab.errors import ConfigError
from cvlab.experiments.common import weights as common_weights
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.experiments.detection import diagrams, drawing, tiling
from cvlab.experiments.detection.config import WEIGHTS_FILE, DetectConfig
from cvlab.experiments.detection.data import augment, writers
from cvlab.experiments.detection.data.augment import ViewTransform
from cvlab.experiments.detection.drawing import LabeledBox
from cvlab.experiments.detection.models import detector as detector_model
from cvlab.experiments.detection.models import registry as detector_registry
from cvlab.experiments.detection.models import yolov3_tiny
from cvlab.experiments.detection.models.base import TwoStageHead
from cvlab.experiments.detection.models.detector import Detector
from cvlab.experiments.detection.models.yolov3_tiny import COCO_CLASSES, DARKNET_NAMES
from cvlab.ops import nms
from cvlab.ops.average_precision import Detections
from cvlab.reports import images as reports_images
from cvlab.reports import tables
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir
from cvlab.storage.file_names import file_stem


class BundledWeights(NamedTuple):
    """Names of bundled weights: for photos, and for the evaluation of a command without photos."""

    photos: str
    evaluation: str


BUNDLED_DETECTORS = {  # by the name that `--model` takes
    "yolo": BundledWeights("everyday", "scenes"),
    "faster_rcnn": BundledWeights("faster_rcnn_everyday", "faster_rcnn_scenes"),
}
MAX_ID_DIGITS = 12  # of an image id in COCO's file names
CLASSES_FILE = "boxes/classes.txt"
CROPS, CROP_QUALITY = "crops", 95
MAX_DETECTIONS = 100  # per image, as in COCO's evaluation
DEFAULT_SCORE_THRESHOLD = 0.25  # of weights that do not name one

PredictFn = Callable[[Sequence[Image.Image], float, float], list[Detections]]  # photos, score_threshold, nms_iou
ProposeFn = Callable[[Image.Image], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LoadedDetector:
    """A detector that is ready to predict.

    Attributes:
        description: Which detector with which weights, for people.
        classes: Names of the classes, by label.
        num_parameters: Without those of a frozen backbone.
        size_px: Side of its square input.
        predict: `predict(photos, score_threshold, nms_iou)` returns each photo's detections, in its pixels.
        score_threshold: From which score on detections count if the user does not say.
        trained_on: Name of the data set, on whose validation split the detector is evaluated.
        propose: `propose(photo)` returns the first stage's proposals (K, 4), in the photo's pixels, before and after
            non-maximum suppression; None for a one-stage detector.
    """

    description: str
    classes: tuple[str, ...]
    num_parameters: int
    size_px: int
    predict: PredictFn
    score_threshold: float = DEFAULT_SCORE_THRESHOLD
    trained_on: str = ""
    propose: ProposeFn | None = None


def load_detector(
    model: str, weights_name: str | None, ctx: ComputeContext, for_evaluation: bool = False
) -> LoadedDetector:
    """Load a detector.

    Args:
        model: `yolo`, `faster_rcnn` or `yolov3_tiny`; `auto` is yolov3_tiny for a file of darknet, else yolo.
        weights_name: A weights file, a run or its name; None for the bundled weights.
        ctx: Where to run it.
        for_evaluation: Prefer the bundled weights that belong to a built-in validation set.

    Raises:
        DataError: if the weights are missing or damaged.
        ConfigError: if the weights are those of another model.
    """
    if model == "auto":
        is_darknet = weights_name is not None and weights_name.endswith(".weights")
        model = yolov3_tiny.NAME if is_darknet else "yolo"
    if model == yolov3_tiny.NAME:
        return _load_yolov3_tiny(weights_name, ctx)
    if weights_name is None:
        bundled = BUNDLED_DETECTORS[model]
        name = bundled.evaluation if for_evaluation else bundled.photos
        path, source = common_weights.BUNDLED_WEIGHTS / f"{name}.safetensors", f"{name}, bundled weights"
    else:
        path = common_weights.resolve_weights_path(weights_name, WEIGHTS_FILE, "detector")
        source = str(path)
    detector = detector_model.load(path, ctx.device)
    metadata = detector.metadata
    is_two_stage = detector_registry.is_two_stage(metadata.model)
    if model == "faster_rcnn" and not is_two_stage:
        raise ConfigError(f"{path}: {metadata.model} is no faster_rcnn", "--model yolo loads it")
    properties = f"{len(metadata.classes)} classes, {metadata.size_px} px, trained on {metadata.trained_on}"
    return LoadedDetector(
        description=f"{metadata.model} ({source}): {properties}",
        classes=metadata.classes,
        num_parameters=sum(p.numel() for p in detector.head.parameters()),
        size_px=metadata.size_px,
        predict=make_predictor(detector, ctx),
        score_threshold=metadata.notes.get("score_threshold", DEFAULT_SCORE_THRESHOLD),
        trained_on=metadata.trained_on,
        propose=_make_proposer(detector, ctx) if is_two_stage else None,
    )


def load_configured_detector(config: DetectConfig) -> tuple[ComputeContext, LoadedDetector]:
    """Select the device and load the detector, which predicts only the configured classes, on tiles if there are some.

    Raises:
        ConfigError: The detector has no such class, or no proposals that could be drawn.
    """
    ctx = select_device(config.device, config.precision, config.threads)
    detector = load_detector(config.model, config.weights, ctx, for_evaluation=not (config.images or config.source))
    if config.explain == diagrams.PROPOSALS and detector.propose is None:
        raise ConfigError("this detector has no first stage that proposes regions", "--model faster_rcnn has one")
    if config.conf is not None:
        detector = replace(detector, score_threshold=config.conf)
    if config.tile is not None:
        predict = tiling.tiled(detector.predict, config.tile, detector.size_px, config.batch_size)
        detector = replace(detector, predict=predict)
    return ctx, select_classes(detector, config.classes)


def select_classes(detector: LoadedDetector, names: Sequence[str]) -> LoadedDetector:
    """Return a detector that predicts only the classes with these names; all of them if there are none.

    Raises:
        ConfigError: The detector has no such class.
    """
    names = [name if name in detector.classes else DARKNET_NAMES.get(name, name) for name in names]
    for name in names:
        if name not in detector.classes:
            raise registry.unknown_name_error("class", name, detector.classes, "cvlab detect sample --dry-run")
    if not names:
        return detector
    selected = torch.tensor([detector.classes.index(name) for name in names])

    def predict(images: Sequence[Image.Image], score_threshold: float, nms_iou: float) -> list[Detections]:
        predictions = detector.predict(images, score_threshold, nms_iou)
        return [select(detections, torch.isin(detections.labels, selected)) for detections in predictions]

    return replace(detector, predict=predict)


def select(detections: Detections, keep: Tensor) -> Detections:
    """Return the detections that a mask (N,) or indices (K,) name."""
    return Detections(detections.boxes_xyxy[keep], detections.scores[keep], detections.labels[keep])


def class_counts(labels: Iterable[str]) -> dict[str, int]:
    """Return how often each label occurs, the most frequent first."""
    return dict(Counter(labels).most_common())


def headline(counts: Mapping[str, int], what: str, where: str) -> str:
    """Return what was detected in one line: `12 objects in 3 photos: person 7, dog 5`."""
    total = sum(counts.values())
    text = ", ".join(f"{label} {count}" for label, count in counts.items())
    return f"{total} {what}{'s' * (total != 1)} in {where}{': ' * bool(text)}{text}"


def _head_outputs(
    detector: Detector, images: Sequence[Image.Image], transforms: Sequence[ViewTransform], ctx: ComputeContext
) -> Any:
    """Return the head's outputs for views of photos."""
    views = [transform.render(image) for transform, image in zip(transforms, images, strict=True)]
    maps = detector.features.batch(photos.to_batch(views).to(ctx.device))
    return detector.head([maps[name] for name in detector.features.names])


def make_predictor(detector: Detector, ctx: ComputeContext) -> PredictFn:
    """Return the function that predicts with a detector; see `LoadedDetector.predict`."""
    size_px = detector.metadata.size_px

    @torch.inference_mode()
    def predict(images: Sequence[Image.Image], score_threshold: float, nms_iou: float) -> list[Detections]:
        transforms = [augment.whole_photo(image.width, image.height, size_px) for image in images]
        with ctx.autocast():
            outputs = _head_outputs(detector, images, transforms, ctx)
            in_views = detector.head.postprocess(outputs, size_px, score_threshold, nms_iou, MAX_DETECTIONS)
        return [
            to_photo_coordinates(detections, transform, image.size)
            for detections, transform, image in zip(in_views, transforms, images, strict=True)
        ]

    return predict


def _make_proposer(detector: Detector, ctx: ComputeContext) -> ProposeFn:
    """Return the function that runs the first stage of a detector; see `LoadedDetector.propose`."""
    head, size_px = detector.head, detector.metadata.size_px
    assert isinstance(head, TwoStageHead)

    @torch.inference_mode()
    def propose(image: Image.Image) -> tuple[Tensor, Tensor]:
        transform = augment.whole_photo(image.width, image.height, size_px)
        with ctx.autocast():
            outputs = _head_outputs(detector, [image], [transform], ctx)
            before, after = head.generate_proposals(outputs)[0]
        return (
            transform.inverse_transform_boxes(before.float().cpu()),
            transform.inverse_transform_boxes(after.float().cpu()),
        )

    return propose


def _load_yolov3_tiny(weights_file: str | None, ctx: ComputeContext) -> LoadedDetector:
    model = yolov3_tiny.build(weights_file, ctx.device)

    @torch.inference_mode()
    def predict(images: Sequence[Image.Image], score_threshold: float, nms_iou: float) -> list[Detections]:
        letterboxed = [yolov3_tiny.letterbox(image) for image in images]
        squares = torch.stack([square for square, *_ in letterboxed]).to(ctx.device)
        with ctx.autocast():
            candidates = yolov3_tiny.detect(model, squares, score_threshold)
        results = []
        for (box, score, label), (_, scale, left, top), image in zip(candidates, letterboxed, images, strict=True):
            keep = nms.batched_nms(box, score, label, nms_iou, MAX_DETECTIONS)
            in_photo = yolov3_tiny.unletterbox(box[keep].cpu(), scale, left, top)
            limits = in_photo.new_tensor([image.width, image.height] * 2)
            results.append(Detections(in_photo.clamp(min=0).minimum(limits), score[keep].cpu(), label[keep].cpu()))
        return results

    description = f"{yolov3_tiny.NAME}: {len(COCO_CLASSES)} classes, {yolov3_tiny.SIZE_PX} px, trained on COCO"
    num_parameters = sum(p.numel() for p in model.parameters())
    return LoadedDetector(description, COCO_CLASSES, num_parameters, yolov3_tiny.SIZE_PX, predict)


def to_photo_coordinates(detections: Detections, transform: ViewTransform, photo_size: tuple[int, int]) -> Detections:
    """Map the detections in a view to its photo, of `photo_size` (width, height), clipped; on the CPU."""
    boxes_xyxy = transform.inverse_transform_boxes(detections.boxes_xyxy.float().cpu())
    width, height = photo_size
    boxes_xyxy = boxes_xyxy.clamp(min=0).minimum(boxes_xyxy.new_tensor([width, height, width, height]))
    return Detections(boxes_xyxy, detections.scores.float().cpu(), detections.labels.cpu())


def describe_objects(detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return `label`, `score` and `box_xyxy`, in pixels of the photo, of each detection."""
    names = [classes[label] for label in detections.labels.tolist()]
    triples = zip(names, detections.scores.tolist(), detections.boxes_xyxy.tolist(), strict=True)
    return [
        {"label": name, "score": score, "box_xyxy": [round(edge, 2) for edge in box]} for name, score, box in triples
    ]


class PhotoDetector:
    """Detects objects in batches of photos, draws them and saves the results; for `cvlab detect`.

    Args:
        detector: The detector.
        out: The run directory to write into.
        nms_iou: Nms iou of detections of one class that overlap by more, the highest-scoring one stays.
        save: What to write for each photo, `txt`, `xml` or `crop`; other kinds are ignored.
        diagram: One of `diagrams.KINDS` or `diagrams.PROPOSALS`, to be drawn for each photo; None for none.
    """

    def __init__(
        self,
        detector: LoadedDetector,
        out: RunDir,
        nms_iou: float,
        save: Sequence[str] = (),
        diagram: str | None = None,
    ) -> None:
        self.detector, self.out, self.save, self.diagram = detector, out, save, diagram
        self.nms_iou = nms_iou

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Return a result for each photo: `objects`, highest score first, and the picture with their boxes."""
        check_interrupt()
        images = [photo.image for photo in batch]
        predictions = self.detector.predict(images, self.detector.score_threshold, self.nms_iou)
        return [self._result(photo, detections) for photo, detections in zip(batch, predictions, strict=True)]

    def _result(self, photo: Photo, detections: Detections) -> PhotoResult:
        names = [self.detector.classes[label] for label in detections.labels.tolist()]
        picture = f"images/{photo.label}-boxes.png"
        boxes = labeled_boxes(detections, self.detector.classes)
        self.out.write_bytes(picture, reports_images.png(drawing.draw(photo.image, boxes)))
        files = {"picture": picture, **self._save_annotations(photo, detections, names)}
        if self.diagram:
            files["explained"] = f"images/{photo.label}-{self.diagram}.png"
            image = self._draw_diagram(self.diagram, photo, detections, names)
            self.out.write_bytes(files["explained"], reports_images.png(image))
        objects = describe_objects(detections, self.detector.classes)
        if "crop" in self.save:
            for k, obj in enumerate(objects):
                obj["crop"] = self._save_crop(photo, k + 1, obj["label"], obj["box_xyxy"])
        width, height = photo.image.size
        return PhotoResult(str(photo.path), {"objects": objects, "width": width, "height": height}, files)

    def _save_annotations(self, photo: Photo, detections: Detections, names: Sequence[str]) -> dict[str, str]:
        """Write a photo's annotation files; return their names by kind."""
        boxes_xyxy, size = detections.boxes_xyxy, photo.image.size
        writer_of = {
            "txt": lambda: writers.write_yolo_txt(boxes_xyxy, detections.labels, size, detections.scores),
            "xml": lambda: writers.write_voc_xml(
                boxes_xyxy, names, size, photo.path.name, scores=detections.scores.tolist()
            ),
        }
        files = {}
        for kind in self.save:
            if kind in writer_of:
                self.out.folder("boxes")
                name = f"boxes/{photo.label}.{kind}"
                files[kind] = f"boxes/{photo.label}-boxes.txt" if name.lower() == CLASSES_FILE else name
                self.out.write_text(files[kind], writer_of[kind]())
            if kind == "txt":
                self.out.write_text(CLASSES_FILE, "".join(f"{name}\n" for name in self.detector.classes))
        return files

    def _save_crop(self, photo: Photo, number: int, label: str, box_xyxy: drawing.Box) -> str:
        """Write what is inside a box as an image in the folder of its class; return its name."""
        folder = f"{CROPS}/{file_stem(label) or 'class'}"
        self.out.folder(CROPS)
        self.out.folder(folder)
        name = f"{folder}/{photo.label}-{number}.jpg"
        buffer = io.BytesIO()
        drawing.crop(photo.image, box_xyxy).save(buffer, "JPEG", quality=CROP_QUALITY)
        self.out.write_bytes(name, buffer.getvalue())
        return name

    def _draw_diagram(self, kind: str, photo: Photo, detections: Detections, names: Sequence[str]) -> Image.Image:
        """Draw a diagram of a photo; of targets with the boxes of its annotation, else with the detections."""
        if kind == diagrams.PROPOSALS:
            assert self.detector.propose is not None
            return diagrams.draw_proposals(photo.image, *self.detector.propose(photo.image))
        boxes_xyxy, labels = diagrams.read_annotation(photo.path) or (detections.boxes_xyxy, names)
        return diagrams.draw(kind, photo.image, boxes_xyxy, labels)


def labeled_boxes(detections: Detections, classes: Sequence[str]) -> list[LabeledBox]:
    """Return the boxes to draw for detections, with class and score."""
    triples = zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return [LabeledBox(tuple(box), f"{classes[label]} {score:.2f}", label) for box, score, label in triples]


def category_ids(classes: tuple[str, ...]) -> Sequence[int]:
    """Return the ids of categories in COCO's files: COCO's own for its 80 classes, in either spelling, else from 1."""
    is_coco = tuple(yolov3_tiny.DARKNET_NAMES.get(name, name) for name in classes) == COCO_CLASSES
    return writers.COCO_CATEGORY_IDS if is_coco else range(1, len(classes) + 1)


def save_coco(detector: LoadedDetector, results: Sequence[PhotoResult], out: RunDir, kinds: Sequence[str]) -> None:
    """Write the boxes of all photos: `json` as COCO's list of results, `coco` as a COCO data set.

    An image's id is the number that its file is called, if all files are, as in COCO, else its position from 1. The
    category ids of COCO's own 80 classes are COCO's, others count from 1.
    """
    if not kinds:
        return
    index = {name: k for k, name in enumerate(detector.classes)}
    names = _file_names([Path(result.image) for result in results])
    images = []
    for result, name in zip(results, names, strict=True):
        objects = result.values["objects"]
        images.append(
            writers.ImageBoxes(
                name,
                (result.values["width"], result.values["height"]),
                torch.tensor([obj["box_xyxy"] for obj in objects]).view(-1, 4),
                torch.tensor([index[obj["label"]] for obj in objects], dtype=torch.int64),
                torch.tensor([obj["score"] for obj in objects]),
            )
        )
    stems = [Path(result.image).stem for result in results]
    has_numbers = all(stem.isascii() and stem.isdecimal() and len(stem) <= MAX_ID_DIGITS for stem in stems)
    image_ids = [int(stem) for stem in stems] if has_numbers else []
    if len(set(image_ids)) < len(stems):
        image_ids = list(range(1, len(stems) + 1))
    ids = writers.CocoIds(image_ids, category_ids(detector.classes))
    out.folder("boxes")
    if "json" in kinds:
        out.write_text("boxes/detections.json", writers.write_coco_results(images, ids))
    if "coco" in kinds:
        out.write_text("boxes/dataset.json", writers.write_coco_json(images, detector.classes, ids))


def save_csv(results: Sequence[PhotoResult], out: RunDir) -> None:
    """Write the boxes of all photos as a table, a row for each."""
    rows: list[tuple[Any, ...]] = [("image", "class", "score", "x1", "y1", "x2", "y2")]
    names = _file_names([Path(result.image) for result in results])
    for name, result in zip(names, results, strict=True):
        for obj in result.values["objects"]:
            score = round(obj["score"], 6)
            rows.append((tables.csv_cell(name), tables.csv_cell(obj["label"]), score, *obj["box_xyxy"]))
    out.folder("boxes")
    out.write_text("boxes/detections.csv", csv_lines(rows))


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as the lines of a CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _file_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of photos, with as much of their folders as tells photos of one name apart."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]
