"""Everyday photos with boxes: Flickr8k, labelled by YOLOv3-tiny and by its captions; the fruit set's real boxes.

Source: Hodosh et al., 2013 (Flickr8k; its official splits). What the teacher is at least half sure of counts as a box
in val and test; to learn from, what it half suspects is there too, with its confidence. The teacher finds few of the
dogs, and takes many for other animals: where two sentences about a photo name dogs, and no other animal, its animals
are dogs, certain ones; where none names an animal, what it suspects is left out. Where two name people, persons that it
half suspects are certain. A student learns its mistakes as well.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cvlab.console import Progress
from cvlab.data import captions, photos, vocabulary
from cvlab.data.datasets import DatasetSize
from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset
from cvlab.experiments.detection.data.coco_classes import COCO_CLASSES
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionDatasetSource, DetectionSample
from cvlab.ops import boxes, nms
from cvlab.storage import atomic

NAME = "everyday"
FOLDER = "everyday-v2"
FLICKR = "flickr8k"
SPLITS = {"train": "train", "val": "dev", "test": "test"}  # ours -> Flickr8k's
FRUIT = ("apple", "banana", "orange")
CLASSES = ("person", "dog", *FRUIT)
ANIMALS = {  # of COCO's classes, and the words for them; the teacher takes one for another
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
PEOPLE = {
    *(
        "person",
        "persons",
        "people",
        "man",
        "men",
        "woman",
        "women",
        "boy",
        "boys",
        "girl",
        "girls",
        "child",
        "children",
    ),
    *("kid", "kids", "baby", "toddler", "lady", "ladies", "guy", "guys", "couple", "crowd", "player", "players"),
}
CONFIRMED, WITNESSES = 0.1, 2  # the teacher's confidence where sentences say the same; how many of the five
PERSON_CONFIRMED = 0.25  # of persons: it finds more of them, and more that is none
LEAST, SURE, DOUBLE_IOU = 0.05, 0.5, 0.45  # the teacher's confidence in train, in val and test; of two boxes
FRUIT_TIMES = 6  # so often a fruit photo stands in train, each time in other views: there are few
BATCH = 16
HINT = f"`cvlab data fetch {NAME}` labels flickr8k; it needs the photos, the fruit set and yolov3_tiny's weights"


def ready(root: Path) -> bool:
    """Whether the photos are labelled."""
    return (root / FOLDER / "boxes.json").is_file()


def names_of(root: Path, split: str) -> list[str]:
    """Return the file names of one of Flickr8k's splits. DataError where they are not there."""
    path = root / FLICKR / f"Flickr_8k.{split}Images.txt"
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", HINT) from error


def make(root: Path, origin: Path | None, patient: bool) -> None:
    """Label all photos: a few minutes. `origin` is the teacher's weights file, else where they were fetched to."""
    from cvlab.experiments.detection.models import yolov3_tiny

    files = [root / FLICKR / "Images" / name for split in SPLITS.values() for name in names_of(root, split)]
    fruit = dataset.load("fruit", root)
    files += [item.path for items in fruit.splits.values() for item in items]
    net = yolov3_tiny.build(str(origin) if origin else None)
    labelled: dict[str, Any] = {}
    with Progress(f"labels of {NAME}", len(files), 0) as progress:
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            boxed = [yolov3_tiny.letterbox(photos.load(path)) for path in some]
            found = yolov3_tiny.detect(net, torch.stack([box[0] for box in boxed]), LEAST)
            for path, (box, score, label), (_, scale, left, top) in zip(some, found, boxed, strict=True):
                kept = nms.batched_nms(box, score, label, DOUBLE_IOU)
                places = yolov3_tiny.unletterbox(box[kept], scale, left, top).clamp(min=0)
                triples = zip(places.tolist(), score[kept].tolist(), label[kept].tolist(), strict=True)
                labelled[str(path.relative_to(root))] = [
                    [COCO_CLASSES[k], round(sure, 3), *(round(v, 1) for v in place)] for place, sure, k in triples
                ]
            if progress.due():
                progress.update(start + len(some), some[-1].name)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    atomic.write_text(root / FOLDER / "boxes.json", json.dumps(labelled))


def load(root: Path, classes: tuple[str, ...] = CLASSES) -> DetectionDataset:
    """Return the photos with the boxes of some classes; of the fruit set those that people drew."""
    path = root / FOLDER / "boxes.json"
    try:
        labelled = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}", HINT) from error
    fruit = dataset.load("fruit", root)
    told = captions.read_csv(root / FLICKR / "captions.txt")
    sentences = {Path(name).stem: values for name, values in told.items()}
    splits: dict[str, tuple[DetectionSample, ...]] = {}
    for split, theirs in SPLITS.items():
        floor = LEAST if split == "train" else SURE
        items = []
        for file in names_of(root, theirs):
            name = f"{FLICKR}/Images/{file}"
            rows, is_whole = confirmed(_rows(root, name, labelled), sentences.get(Path(file).stem, []), floor)
            if is_whole or split != "train":
                items.append(_item(root, name, rows, classes, None))
        real = fruit.splits[split] * (FRUIT_TIMES if split == "train" else 1)
        for item in real:
            name = str(item.path.relative_to(root))
            rows = [row for row in _rows(root, name, labelled) if row[1] >= floor]
            items.append(_item(root, name, rows, classes, item))
        splits[split] = tuple(items)
    return DetectionDataset(NAME, classes, splits)


def _rows(root: Path, name: str, labelled: dict[str, Any]) -> list[Any]:
    if name not in labelled:
        raise DataError(f"{root / FOLDER}: has no labels for {name}", HINT)
    rows: list[Any] = labelled[name]
    return rows


def confirmed(rows: Sequence[Any], sentences: Sequence[str], floor: float) -> tuple[list[Any], bool]:
    """Return the teacher's boxes [class, confidence, x1, y1, x2, y2] that stand, in the light of what people say.

    The second is whether nothing is plainly missing: False where people name an animal and the teacher has none.
    """
    words = [set(vocabulary.tokenize(sentence)) for sentence in sentences]
    named = {kind: sum(bool(some & set(names)) for some in words) for kind, names in ANIMALS.items()}
    plain = [kind for kind, count in named.items() if count >= WITNESSES]
    are_people_named = sum(bool(some & PEOPLE) for some in words) >= WITNESSES
    others = [
        [row[0], 1.0, *row[2:]] if are_people_named and row[0] == "person" and row[1] >= PERSON_CONFIRMED else row
        for row in rows
        if row[0] not in ANIMALS and row[1] >= floor
    ]
    animals = [row for row in rows if row[0] in ANIMALS]
    if len(plain) != 1:
        kept = floor if any(named.values()) else SURE
        return others + [row for row in animals if row[1] >= kept], not plain
    animals = [row for row in animals if row[1] >= CONFIRMED]
    places = torch.tensor([row[2:] for row in animals], dtype=torch.float32).view(-1, 4)
    best = nms.nms(places, torch.tensor([row[1] for row in animals]), DOUBLE_IOU)
    return others + [[plain[0], 1.0, *animals[k][2:]] for k in best.tolist()], bool(animals)


def _item(
    root: Path, name: str, rows: list[Any], classes: tuple[str, ...], real: DetectionSample | None
) -> DetectionSample:
    index = {known: k for k, known in enumerate(classes)}
    wanted = [row for row in rows if row[0] in index and (real is None or row[0] not in FRUIT)]
    found = torch.tensor([row[2:] for row in wanted], dtype=torch.float32).view(-1, 4)
    labels = torch.tensor([index[row[0]] for row in wanted]).long()
    confidence = torch.tensor([row[1] for row in wanted])
    keep = boxes.area(found) > 0
    found, labels, confidence = found[keep], labels[keep], confidence[keep]
    if real is not None:
        found = torch.cat([real.boxes_xyxy, found])
        labels = torch.cat([torch.tensor([index[FRUIT[k]] for k in real.labels.tolist()]).long(), labels])
        confidence = torch.cat([torch.ones(len(real.labels)), confidence])
    return DetectionSample(root / name, found, labels, torch.zeros(len(labels), dtype=torch.bool), confidence)


def check(root: Path) -> str:
    """Read all labels."""
    found = load(root)
    count = sum(len(item.labels) for items in found.splits.values() for item in items)
    return f"{sum(len(items) for items in found.splits.values())} photos, {count} boxes"


SOURCE = DetectionDatasetSource(
    name=NAME,
    summary="8,000 everyday photos of Flickr8k with boxes by YOLOv3-tiny, and the fruit set",
    license="of Flickr8k: research and education only",
    size=DatasetSize(train_images=6200, test_images=1060, image_px=224, channels=3, num_classes=len(CLASSES)),
    ready=ready,
    check=check,
    fetch=make,
)
