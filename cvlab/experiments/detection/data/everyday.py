"""Everyday photos: Flickr8k with YOLOv3-tiny's pseudo-labels, filtered by the captions, and the fruit set.

References: Hodosh et al., 2013 (Flickr8k, with its official splits).

In val and test a pseudo-label counts as a box if the teacher's confidence is at least 0.5; in train also those of lower
confidence do, with their confidence. The teacher finds few of the dogs and mistakes many for other animals, so the
captions correct it: if two captions of a photo name dogs and no other animal, the photo's animals are dogs, with
confidence 1; if no caption names an animal, only confident animals stay. If two captions name people, persons of lower
confidence get confidence 1. A student learns the teacher's mistakes too.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cvlab.console import Progress
from cvlab.data import captions, photos, vocabulary
from cvlab.data.datasets import DatasetSize
from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionDatasetSource, DetectionSample
from cvlab.experiments.detection.models import yolov3_tiny
from cvlab.experiments.detection.models.yolov3_tiny import COCO_CLASSES
from cvlab.ops import boxes, nms
from cvlab.storage import atomic

NAME = "everyday"
FOLDER = "everyday-v2"
LABELS_FILE = "boxes.json"
FLICKR = "flickr8k"
FLICKR_SPLITS = {"train": "train", "val": "dev", "test": "test"}  # our names -> Flickr8k's
FRUIT = ("apple", "banana", "orange")
CLASSES = ("person", "dog", *FRUIT)
ANIMALS = {  # COCO's animals, which the teacher confuses, and the words that name them in captions
    "dog": ("dog", "dogs", "puppy", "puppies", "greyhound", "greyhounds"),
    "cat": ("cat", "cats", "kitten"),
    "horse": ("horse", "horses", "pony"),
    "sheep": ("sheep", "lamb", "goat", "goats"),
    "cow": ("cow", "cows", "bull", "bulls", "cattle"),
    "bear": ("bear", "bears"),
    "bird": ("bird", "birds", "seagull", "seagulls", "duck", "ducks"),
    "elephant": ("elephant", "elephants"),
    "zebra": ("zebra", "zebras"),
    "giraffe": ("giraffe", "giraffes"),
    "teddy bear": (),
}
# fmt: off
PEOPLE = {
    "person", "persons", "people", "man", "men", "woman", "women", "boy", "boys", "girl", "girls", "child", "children",
    "kid", "kids", "baby", "toddler", "lady", "ladies", "guy", "guys", "couple", "crowd", "player", "players",
}
# fmt: on
MIN_CAPTIONS = 2  # of the five, that must agree
MIN_CONFIDENCE_ANIMAL = 0.1  # of the teacher, where captions name the animal
MIN_CONFIDENCE_PERSON = 0.25  # where captions name people: the teacher finds more of them, and more false ones
MIN_CONFIDENCE_TRAIN, MIN_CONFIDENCE_EVAL = 0.05, 0.5
NMS_IOU = 0.45
FRUIT_REPEATS = 6  # how often each fruit photo is in train, each time in other random views: there are few
BATCH_SIZE = 16
HINT = f"`cvlab data fetch {NAME}` labels flickr8k; it needs the photos, the fruit set and yolov3_tiny's weights"


class PseudoLabel(NamedTuple):
    """A box that the teacher predicts: a class of COCO, a confidence in [0, 1], edges in pixels. A row of the file."""

    name: str
    confidence: float
    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def box_xyxy(self) -> tuple[float, float, float, float]:
        """The edges."""
        return self.x1, self.y1, self.x2, self.y2


def is_ready(root: Path) -> bool:
    """Whether the photos are labeled."""
    return (root / FOLDER / LABELS_FILE).is_file()


def _file_names(root: Path, flickr_split: str) -> list[str]:
    """Return the file names of one of Flickr8k's splits. DataError if they are missing."""
    path = root / FLICKR / f"Flickr_8k.{flickr_split}Images.txt"
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", HINT) from error


def create(root: Path, origin: Path | None, wait: bool) -> None:
    """Label all photos, which takes a few minutes. `origin` is the teacher's weights file, else the downloaded one."""
    paths = [root / FLICKR / "Images" / name for split in FLICKR_SPLITS.values() for name in _file_names(root, split)]
    fruit = dataset.load("fruit", root)
    paths += [sample.path for samples in fruit.splits.values() for sample in samples]
    teacher = yolov3_tiny.build(str(origin) if origin else None)
    labels: dict[str, list[PseudoLabel]] = {}
    with Progress(f"labels of {NAME}", len(paths), 0) as progress:
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            for path, predicted in zip(batch, _predict(teacher, batch), strict=True):
                labels[str(path.relative_to(root))] = predicted
            if progress.due():
                progress.update(start + len(batch), batch[-1].name)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    atomic.write_text(root / FOLDER / LABELS_FILE, json.dumps(labels))


def _predict(teacher: yolov3_tiny.YoloV3Tiny, paths: Sequence[Path]) -> list[list[PseudoLabel]]:
    """Return the teacher's boxes in each photo."""
    letterboxed = [yolov3_tiny.letterbox(photos.load(path)) for path in paths]
    squares = torch.stack([square for square, *_ in letterboxed])
    candidates = yolov3_tiny.detect(teacher, squares, MIN_CONFIDENCE_TRAIN)
    results = []
    for (box, score, label), (_, scale, left, top) in zip(candidates, letterboxed, strict=True):
        keep = nms.batched_nms(box, score, label, NMS_IOU)
        in_photo = yolov3_tiny.unletterbox(box[keep], scale, left, top).clamp(min=0)
        triples = zip(in_photo.tolist(), score[keep].tolist(), label[keep].tolist(), strict=True)
        results.append(
            [
                PseudoLabel(COCO_CLASSES[k], round(confidence, 3), *(round(edge, 1) for edge in edges))
                for edges, confidence, k in triples
            ]
        )
    return results


def load(root: Path, classes: tuple[str, ...] = CLASSES) -> DetectionDataset:
    """Read the photos with their boxes of `classes`; the fruits of the fruit set are those that people drew."""
    labels = _read_labels(root)
    fruit = dataset.load("fruit", root)
    by_file = captions.read_csv(root / FLICKR / "captions.txt")
    by_stem = {Path(name).stem: sentences for name, sentences in by_file.items()}
    splits: dict[str, tuple[DetectionSample, ...]] = {}
    for split, flickr_split in FLICKR_SPLITS.items():
        min_confidence = MIN_CONFIDENCE_TRAIN if split == "train" else MIN_CONFIDENCE_EVAL
        samples = []
        for file in _file_names(root, flickr_split):
            name = f"{FLICKR}/Images/{file}"
            photo_captions = by_stem.get(Path(file).stem, [])
            pseudo, is_complete = filter_pseudo_labels(_labels_of(root, name, labels), photo_captions, min_confidence)
            if is_complete or split != "train":
                samples.append(_sample(root / name, pseudo, classes))
        for real in fruit.splits[split] * (FRUIT_REPEATS if split == "train" else 1):
            name = str(real.path.relative_to(root))
            pseudo = [
                label
                for label in _labels_of(root, name, labels)
                if label.confidence >= min_confidence and label.name not in FRUIT
            ]
            samples.append(_merge(real, _sample(root / name, pseudo, classes), classes))
        splits[split] = tuple(samples)
    return DetectionDataset(NAME, classes, splits)


def _read_labels(root: Path) -> dict[str, list[PseudoLabel]]:
    """Return the labels of each photo by its path below the root folder."""
    path = root / FOLDER / LABELS_FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}", HINT) from error
    return {name: [PseudoLabel(*row) for row in photo_rows] for name, photo_rows in rows.items()}


def _labels_of(root: Path, name: str, labels: dict[str, list[PseudoLabel]]) -> list[PseudoLabel]:
    """Return the labels of a photo. DataError if it has not been labeled."""
    if name not in labels:
        raise DataError(f"{root / FOLDER}: has no labels for {name}", HINT)
    return labels[name]


def filter_pseudo_labels(
    labels: Sequence[PseudoLabel], photo_captions: Sequence[str], min_confidence: float
) -> tuple[list[PseudoLabel], bool]:
    """Filter and correct a photo's pseudo-labels by its captions.

    Returns:
        The labels, and whether they are complete: not if captions name an animal that the teacher does not find.
    """
    token_sets = [set(vocabulary.tokenize(caption)) for caption in photo_captions]
    mentions = {animal: sum(bool(caption & set(names)) for caption in token_sets) for animal, names in ANIMALS.items()}
    agreed = [animal for animal, count in mentions.items() if count >= MIN_CAPTIONS]
    people_agreed = sum(bool(caption & PEOPLE) for caption in token_sets) >= MIN_CAPTIONS
    not_animals = [
        label._replace(confidence=1.0)
        if people_agreed and label.name == "person" and label.confidence >= MIN_CONFIDENCE_PERSON
        else label
        for label in labels
        if label.name not in ANIMALS and label.confidence >= min_confidence
    ]
    animals = [label for label in labels if label.name in ANIMALS]
    if len(agreed) != 1:
        threshold = min_confidence if any(mentions.values()) else MIN_CONFIDENCE_EVAL
        return not_animals + [label for label in animals if label.confidence >= threshold], not agreed
    animals = [label for label in animals if label.confidence >= MIN_CONFIDENCE_ANIMAL]
    boxes_xyxy = torch.tensor([label.box_xyxy for label in animals], dtype=torch.float32).view(-1, 4)
    keep = nms.nms(boxes_xyxy, torch.tensor([label.confidence for label in animals]), NMS_IOU)
    corrected = [animals[k]._replace(name=agreed[0], confidence=1.0) for k in keep.tolist()]
    return not_animals + corrected, bool(animals)


def _sample(path: Path, labels: Sequence[PseudoLabel], classes: tuple[str, ...]) -> DetectionSample:
    """Make a sample of the pseudo-labels of `classes`, without those that have no area."""
    index = {known: k for k, known in enumerate(classes)}
    known_labels = [label for label in labels if label.name in index]
    boxes_xyxy = torch.tensor([label.box_xyxy for label in known_labels], dtype=torch.float32).view(-1, 4)
    class_labels = torch.tensor([index[label.name] for label in known_labels]).long()
    confidence = torch.tensor([label.confidence for label in known_labels])
    keep = boxes.area(boxes_xyxy) > 0
    difficult = torch.zeros(int(keep.sum()), dtype=torch.bool)
    return DetectionSample(path, boxes_xyxy[keep], class_labels[keep], difficult, confidence[keep])


def _merge(real: DetectionSample, pseudo: DetectionSample, classes: tuple[str, ...]) -> DetectionSample:
    """Return a fruit photo with the boxes that people drew, of confidence 1, before the pseudo-labels."""
    index = {known: k for k, known in enumerate(classes)}
    real_labels = torch.tensor([index[FRUIT[k]] for k in real.labels.tolist()]).long()
    labels = torch.cat([real_labels, pseudo.labels])
    assert pseudo.confidence is not None
    return DetectionSample(
        pseudo.path,
        torch.cat([real.boxes_xyxy, pseudo.boxes_xyxy]),
        labels,
        torch.zeros(len(labels), dtype=torch.bool),
        torch.cat([torch.ones(len(real_labels)), pseudo.confidence]),
    )


def check(root: Path) -> str:
    """Read all labels and return a line about them."""
    samples = [sample for split in load(root).splits.values() for sample in split]
    return f"{len(samples)} photos, {sum(len(sample.labels) for sample in samples)} boxes"


@dataclass(frozen=True, kw_only=True)
class EverydaySource(DetectionDatasetSource):
    """The pseudo-labeled photos, with Flickr8k's splits."""

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
        """Read the data set; `val_fraction` is not used, for it has a validation split."""
        self.reject_path(path)
        return load(root)


SOURCE = EverydaySource(
    name=NAME,
    summary="8,000 everyday photos of Flickr8k with boxes by YOLOv3-tiny, and the fruit set",
    license="of Flickr8k: research and education only",
    size=DatasetSize(train_images=6200, test_images=1060, image_px=224, channels=3, num_classes=len(CLASSES)),
    ready=is_ready,
    check=check,
    fetch=create,
)
