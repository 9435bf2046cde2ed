"""A training task on a bundled photo with random boxes, of which the steps can be measured without a data set."""

import dataclasses

import torch

from cvlab import _compat
from cvlab.data import datasets
from cvlab.engine.task import TrainTask
from cvlab.experiments.detection import setup
from cvlab.experiments.detection.config import DetectorConfig
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionDatasetSource, DetectionSample
from cvlab.experiments.detection.feature_cache import FeatureCache

NUM_BOXES = 4
BOX_SIDES = (0.2, 0.6)  # smallest and largest, as a share of the photo's


def synthetic_dataset(name: str, count: int) -> DetectionDataset:
    """Return a data set with as many classes as the one called `name`; its `count` samples are all the same."""
    path = _compat.sample_photo()
    header = annotations.read_header(path)
    num_classes = datasets.get_of_kind(name, DetectionDatasetSource).size.num_classes
    generator = torch.Generator().manual_seed(0)
    low, high = BOX_SIDES
    sides = low + (high - low) * torch.rand(NUM_BOXES, 2, generator=generator)
    corners = torch.rand(NUM_BOXES, 2, generator=generator) * (1 - sides)
    scale = torch.tensor([header.width, header.height] * 2)
    sample = DetectionSample(
        path,
        boxes_xyxy=torch.cat([corners, corners + sides], 1) * scale,
        labels=torch.randint(0, num_classes, (NUM_BOXES,), generator=generator),
        difficult=torch.zeros(NUM_BOXES, dtype=torch.bool),
    )
    return DetectionDataset("generated", tuple(map(str, range(num_classes))), {"train": (sample,) * count})


def build_task(config: DetectorConfig) -> TrainTask:
    """Return the untrained head, its loss, and batches of one photo; its maps are computed once, if they are cached."""
    data = config.data.model_copy(update={"num_train": None})
    config = config.model_copy(update={"data": data})
    box_dataset = synthetic_dataset(config.data.name, config.batch_size)
    built = setup.build(config, box_dataset)
    cache = None
    if built.num_views:
        single = dataclasses.replace(box_dataset, splits={"train": box_dataset.splits["train"][:1]})
        view = setup.cached_features(config, dataclasses.replace(built, box_dataset=single), "train", 1, lambda: None)
        maps = [level.repeat(config.batch_size, 1, 1, 1) for level in view.maps]
        cache = FeatureCache(maps, view.views * config.batch_size)
    return setup.build_task(config, built, setup.make_batches(config, built, cache), lambda _: {})
