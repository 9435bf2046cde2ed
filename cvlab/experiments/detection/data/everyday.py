"""Everyday photos: coco_people with the 80 classes of COCO, and the fruit set, whose classes COCO has too.

People drew all boxes, but not around everything: coco_people comes without its crowds, the fruit set with fruit only.
In train, what the bundled detector of COCO's classes detects beside the boxes is ignored: it is neither an object to
be learned nor background. Val and test are those of coco_people, with its boxes alone.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cvlab.console import Progress
from cvlab.data import descriptions, photos
from cvlab.errors import DataError
from cvlab.experiments.detection.data import augment, dataset
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionDatasetSource, DetectionSample
from cvlab.experiments.detection.models import detector, nanodet
from cvlab.experiments.detection.models.detector import Detector
from cvlab.ops import boxes
from cvlab.storage import atomic

NAME = "everyday"
FOLDER = "everyday-v3"
LABELS_FILE = "detections.json"
PEOPLE, FRUIT = "coco_people", "fruit"
MIN_SCORE = 0.3  # of a detection that is ignored
NMS_IOU = 0.6
MAX_IOU = 0.5  # with a box of its class: a detection that overlaps more is that object
FRUIT_REPEATS = 4  # how often each fruit photo is in train, each time in other random views: there are few
MAX_DETECTIONS = 100  # of a photo
BATCH_SIZE = 16
HINT = f"`cvlab data fetch {NAME}` makes it of {PEOPLE} and {FRUIT}"


class Detection(NamedTuple):
    """A row of the file: a class of COCO, a score in [0, 1], edges in pixels of the photo."""

    name: str
    score: float
    x1: float
    y1: float
    x2: float
    y2: float


def create(root: Path, origin: Path | None, wait: bool) -> None:
    """Detect objects in the training photos, which takes about a minute, and write the detections."""
    samples = [sample for name in (PEOPLE, FRUIT) for sample in dataset.load(name, root).splits["train"]]
    model = detector.load(nanodet.BUNDLED_WEIGHTS, torch.device("cpu"))
    rows: dict[str, list[Detection]] = {}
    with Progress(f"detections of {NAME}", len(samples), 0) as progress:
        for start in range(0, len(samples), BATCH_SIZE):
            paths = [sample.path for sample in samples[start : start + BATCH_SIZE]]
            rows |= {
                str(path.relative_to(root)): detections
                for path, detections in zip(paths, _detect(model, paths), strict=True)
            }
            if progress.due():
                progress.update(start + len(paths), paths[-1].name)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    atomic.write_text(root / FOLDER / LABELS_FILE, json.dumps(rows))


@torch.inference_mode()
def _detect(model: Detector, paths: Sequence[Path]) -> list[list[Detection]]:
    """Return the detections in each photo."""
    size_px, classes = model.metadata.size_px, model.metadata.classes
    images = [photos.load(path) for path in paths]
    views = [augment.whole_photo(*image.size, size_px) for image in images]
    batch = photos.to_batch([view.render(image) for view, image in zip(views, images, strict=True)])
    maps = model.features.batch(batch)
    outputs = model.head([maps[name] for name in model.features.names])
    results = model.head.postprocess(outputs, size_px, MIN_SCORE, NMS_IOU, MAX_DETECTIONS)
    rows = []
    for view, result in zip(views, results, strict=True):
        in_photo = view.inverse_transform_boxes(result.boxes_xyxy)
        triples = zip(result.labels.tolist(), result.scores.tolist(), in_photo.tolist(), strict=True)
        rows.append(
            [
                Detection(classes[label], round(score, 3), *(round(edge, 1) for edge in box))
                for label, score, box in triples
            ]
        )
    return rows


def load(root: Path) -> DetectionDataset:
    """Read both sets and what is ignored in their training photos."""
    rows = _read_detections(root)
    people, fruit = dataset.load(PEOPLE, root), dataset.load(FRUIT, root)
    train = [*people.splits["train"], *(_relabel(fruit, people.classes) * FRUIT_REPEATS)]
    with_ignored = tuple(_add_ignored(sample, _rows_of(root, sample, rows), people.classes) for sample in train)
    return DetectionDataset(NAME, people.classes, people.splits | {"train": with_ignored})


def _read_detections(root: Path) -> dict[str, list[Detection]]:
    """Return the detections of each photo by its path below the root folder."""
    path = root / FOLDER / LABELS_FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}", HINT) from error
    return {name: [Detection(*row) for row in photo_rows] for name, photo_rows in rows.items()}


def _rows_of(root: Path, sample: DetectionSample, rows: dict[str, list[Detection]]) -> list[Detection]:
    """Return the detections of a photo. DataError if it has none on file."""
    name = str(sample.path.relative_to(root))
    if name not in rows:
        raise DataError(f"{root / FOLDER}: has no detections of {name}", HINT)
    return rows[name]


def _relabel(fruit: DetectionDataset, classes: Sequence[str]) -> list[DetectionSample]:
    """Return the training photos of the fruit set with the labels that `classes` give its classes."""
    label_of = torch.tensor([classes.index(name) for name in fruit.classes])
    return [dataclasses.replace(sample, labels=label_of[sample.labels]) for sample in fruit.splits["train"]]


def _add_ignored(sample: DetectionSample, rows: Sequence[Detection], classes: Sequence[str]) -> DetectionSample:
    """Add the detections that are no box of the sample, as difficult boxes."""
    detected = torch.tensor([row[2:] for row in rows], dtype=torch.float32).view(-1, 4)
    labels = torch.tensor([classes.index(row.name) for row in rows], dtype=torch.int64)
    is_same = (boxes.iou(detected, sample.boxes_xyxy) > MAX_IOU) & (labels[:, None] == sample.labels)
    is_ignored = ~is_same.any(1) & (boxes.area(detected) > 0)
    num_ignored = int(is_ignored.sum())
    return dataclasses.replace(
        sample,
        boxes_xyxy=torch.cat([sample.boxes_xyxy, detected[is_ignored]]),
        labels=torch.cat([sample.labels, labels[is_ignored]]),
        difficult=torch.cat([sample.difficult, torch.ones(num_ignored, dtype=torch.bool)]),
        crowd=None if sample.crowd is None else torch.cat([sample.crowd, torch.zeros(num_ignored, dtype=torch.bool)]),
    )


def check(root: Path) -> str:
    """Read everything and return a line about it."""
    samples = [sample for split in load(root).splits.values() for sample in split]
    num_ignored = sum(int(sample.difficult.sum()) for sample in samples)
    return (
        f"{len(samples)} photos, {sum(len(sample.labels) for sample in samples)} boxes, of which {num_ignored} ignored"
    )


@dataclass(frozen=True, kw_only=True)
class EverydaySource(DetectionDatasetSource):
    """The joined photos, with the splits of coco_people."""

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
        """Read the data set; `val_fraction` is not used, for it has a validation split."""
        self.reject_path(path)
        return load(root)


SOURCE = EverydaySource(
    **descriptions.of_source("boxes", "everyday"),
    check=check,
    fetch=create,
)
