"""Published detection data sets in COCO's layout; cvlab/data/coco_sets.py installs them."""

import functools
from pathlib import Path

from cvlab.data import coco_sets, descriptions
from cvlab.data.coco_sets import CocoSet
from cvlab.data.datasets import FetchFn
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


def _source(coco_set: CocoSet, fetch: FetchFn) -> AnnotatedSource:
    return AnnotatedSource(
        **descriptions.of_source("boxes", coco_set.name),
        read=functools.partial(read, coco_set),
        check=functools.partial(check, coco_set),
        fetch=fetch,
    )


COCO_PEOPLE = _source(coco_sets.COCO_PEOPLE, coco_sets.fetch_people)
COCO = _source(coco_sets.COCO, coco_sets.fetch_coco)
