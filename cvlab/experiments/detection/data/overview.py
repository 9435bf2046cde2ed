"""What `cvlab data show` shows of a detection data set."""

from collections import Counter

import torch
from torch import Tensor

from cvlab.data import photos
from cvlab.experiments.common.data_overview import DataOverview, DataSample, photo_items
from cvlab.experiments.detection import drawing
from cvlab.experiments.detection.config import DetectorConfig
from cvlab.experiments.detection.data import augment, sizing
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample
from cvlab.experiments.detection.drawing import LabeledBox

MAX_SHOWN_PX = 640  # longer side of a photo on the sheet


def build(config: DetectorConfig, dataset: DetectionDataset, num_samples: int) -> DataOverview:
    """Return the splits, the number of boxes of each class, and photos with their boxes, as they are and augmented."""
    paths = {split: [sample.path for sample in samples] for split, samples in dataset.splits.items()}
    items, sizes = photo_items(paths)
    train = dataset.splits["train"]
    indices = torch.linspace(0, len(train) - 1, min(num_samples, len(train))).long().tolist()
    size_px = sizing.input_size(config, dataset)
    return DataOverview(
        name=dataset.name,
        num_images={split: len(samples) for split, samples in dataset.splits.items()},
        classes={split: _box_counts(samples, dataset.classes) for split, samples in dataset.splits.items()},
        sizes=sizes,
        samples=[_sample(config, size_px, dataset, index, train[index]) for index in indices],
        items=items,
        notes=("the numbers of the classes are those of their boxes",),
    )


def _box_counts(samples: tuple[DetectionSample, ...], classes: tuple[str, ...]) -> dict[str, int]:
    counts = Counter(label for sample in samples for label in sample.labels.tolist())
    return {name: counts[index] for index, name in enumerate(classes)}


def _labeled(boxes_xyxy: Tensor, labels: Tensor, classes: tuple[str, ...]) -> list[LabeledBox]:
    pairs = zip(boxes_xyxy.tolist(), labels.tolist(), strict=True)
    return [LabeledBox(tuple(box), classes[label], label) for box, label in pairs]


def _sample(
    config: DetectorConfig, size_px: int, dataset: DetectionDataset, index: int, sample: DetectionSample
) -> DataSample:
    photo = photos.load(sample.path)
    scale = min(1.0, MAX_SHOWN_PX / max(photo.size))
    shown = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
    boxes = _labeled(sample.boxes_xyxy * scale, sample.labels, dataset.classes)
    view = augment.random_view(photo.width, photo.height, size_px, config.augment, config.seed, index, 0)
    image = augment.color_jitter(view.render(photo), config.augment, config.seed, index, 0)
    visible, indices = view.visible_boxes(sample.boxes_xyxy)
    return DataSample(
        sample.path.name,
        drawing.draw(shown, boxes),
        drawing.draw(image, _labeled(visible, sample.labels[indices], dataset.classes)),
    )
