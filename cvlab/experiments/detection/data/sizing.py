"""Sizes that suit a data set, for configurations with `auto`: the side of the input, and the views of each photo."""

import torch

from cvlab.experiments.detection.config import AUTO, DetectorConfig
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample

SIZES_PX = (416, 512, 640)
SMALL_BOX_PX = 24  # three cells of the finest map: the side that the smaller boxes should have in the input
SMALL_QUANTILE = 0.1  # of the boxes are smaller than the "smaller boxes"
MAX_MEASURED_PHOTOS = 500
TOTAL_VIEWS, MAX_VIEWS = 3000, 64  # enough random views for a head to learn from, of all photos and of each


def input_size(config: DetectorConfig, box_dataset: DetectionDataset) -> int:
    """Return the side of the input images in pixels: of SIZES_PX, the first in which the smaller boxes are not tiny."""
    if config.size != AUTO:
        return config.size
    samples = box_dataset.splits["train"][: config.data.num_train][:MAX_MEASURED_PHOTOS]
    sides = torch.cat([_relative_sides(sample) for sample in samples])
    if not len(sides):
        return SIZES_PX[0]
    min_size = SMALL_BOX_PX / max(sides.quantile(SMALL_QUANTILE).item(), 1e-6)
    return next((size for size in SIZES_PX if size >= min_size), SIZES_PX[-1])


def _relative_sides(sample: DetectionSample) -> torch.Tensor:
    """Return the sides (K,) of squares as large as the boxes that count, relative to the photo's longer side."""
    header = annotations.read_header(sample.path)
    boxes_xyxy = sample.boxes_xyxy[~sample.difficult]
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1).sqrt() / max(header.width, header.height)


def num_views(config: DetectorConfig, box_dataset: DetectionDataset) -> int:
    """Return the number of cached views of each photo, the more the fewer photos there are; 0: new in every epoch."""
    if config.views != AUTO:
        return config.views
    count = len(box_dataset.splits["train"][: config.data.num_train])
    return min(MAX_VIEWS, round(TOTAL_VIEWS / max(1, count)))
