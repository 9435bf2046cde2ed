"""Published detection data sets in COCO's layout; cvlab/data/coco_sets.py installs them."""

import functools
from pathlib import Path

from cvlab.data import coco_sets
from cvlab.data.coco_sets import CocoSet
from cvlab.data.datasets import DatasetSize
from cvlab.experiments.detection.data import coco, dataset
from cvlab.experiments.detection.data.annotations import AnnotationSet
from cvlab.experiments.detection.data.dataset import AnnotatedSource


def read(coco_set: CocoSet, root: Path) -> AnnotationSet:
    """Read the boxes of an installed data set. DataError if it is missing."""
    return coco.read_splits(coco_set.annotation_files(root, coco_sets.INSTANCES), root / coco_set.name)


def check(coco_set: CocoSet, root: Path) -> str:
    """Read a data set whole and return a line about it. DataError if photos are missing."""
    loaded = dataset.from_annotations(coco_set.name, read(coco_set, root), val_fraction=0.0)
    coco_set.check_counts(root, {split: len(samples) for split, samples in loaded.splits.items()})
    return dataset.summarize(loaded)


COCO_PEOPLE = AnnotatedSource(
    name=coco_sets.COCO_PEOPLE.name,
    summary="2,500 photos of COCO with people: 23,421 boxes in 80 classes, five captions each; 2,000 to train on",
    license="CC BY 4.0 (the annotations; the photos are under Flickr's terms)",
    size=DatasetSize(train_images=2000, test_images=300, image_px=448, channels=3, num_classes=80),
    read=functools.partial(read, coco_sets.COCO_PEOPLE),
    ready=coco_sets.COCO_PEOPLE.ready,
    check=functools.partial(check, coco_sets.COCO_PEOPLE),
    fetch=coco_sets.fetch_people,
)
COCO = AnnotatedSource(
    name=coco_sets.COCO.name,
    summary="COCO 2017: 118,287 photos to train on, 5,000 to validate: boxes in 80 classes, five captions each; 19 GB",
    license="CC BY 4.0 (the annotations; the photos are under Flickr's terms)",
    size=DatasetSize(train_images=118_287, test_images=0, image_px=640, channels=3, num_classes=80),
    read=functools.partial(read, coco_sets.COCO),
    ready=coco_sets.COCO.ready,
    check=functools.partial(check, coco_sets.COCO),
    fetch=coco_sets.fetch_coco,
)
