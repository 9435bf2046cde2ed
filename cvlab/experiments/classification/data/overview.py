"""What `cvlab data show` shows of a data set for classification."""

from collections import Counter
from functools import partial

import torch
from torch import Tensor

from cvlab.experiments.classification.config import ClassifyConfig
from cvlab.experiments.classification.data.augment import Augmentation
from cvlab.experiments.classification.data.images import ImageDataset, ImageRows, Images, split, to_image
from cvlab.experiments.common.data_overview import DataOverview, DataSample, Item, digest_bytes

CHUNK = 2000  # images that are read at a time


def build(config: ClassifyConfig, dataset: ImageDataset, num_samples: int) -> DataOverview:
    """Return the splits, classes and samples of a data set.

    Args:
        config: Its splits and augmentation.
        dataset: The data set.
        num_samples: Number of training images to show, spread over the training split.
    """
    splits = split(dataset, config.data.val_fraction, config.data.num_train)
    items = [item for name, (pixels, _) in splits.items() for item in _items(name, pixels, dataset)]
    side = splits["train"][0].shape[1]
    return DataOverview(
        name=dataset.name,
        num_images={name: len(labels) for name, (_, labels) in splits.items()},
        classes={name: _class_counts(labels, dataset.classes) for name, (_, labels) in splits.items()},
        sizes=dataset.photo_sizes or {(side, side): sum(len(labels) for _, labels in splits.values())},
        samples=_samples(config, dataset, *splits["train"], num_samples),
        items=items,
    )


def _class_counts(labels: Tensor, classes: tuple[str, ...]) -> dict[str, int]:
    counts = Counter(labels.tolist())
    return {name: counts[index] for index, name in enumerate(classes)}


def _items(name: str, pixels: Images, dataset: ImageDataset) -> list[Item]:
    files = dataset.files.get(name, ())
    if isinstance(pixels, ImageRows):
        digests = list(pixels.digests)
    else:
        digests = []
        for start in range(0, len(pixels), CHUNK):
            digests += [digest_bytes(row.tobytes()) for row in pixels[start : start + CHUNK].numpy()]
    return [
        Item(name, files[k] if k < len(files) else str(k), partial(to_image, pixels, k), digest)
        for k, digest in enumerate(digests)
    ]


def _samples(
    config: ClassifyConfig, dataset: ImageDataset, pixels: Images, labels: Tensor, num_samples: int
) -> list[DataSample]:
    count = min(num_samples, len(labels))
    indices = torch.linspace(0, len(labels) - 1, count).long()
    augment = Augmentation(**config.augment.model_dump())
    originals = pixels[indices]
    changed = augment(originals, indices, config.seed, 0).permute(0, 3, 1, 2).float()
    changed = augment.cutout(changed.contiguous(), indices, config.seed, 0).permute(0, 2, 3, 1).to(torch.uint8)
    is_augmented = augment != Augmentation()
    return [
        DataSample(
            dataset.classes[int(labels[index])],
            to_image(originals, k),
            to_image(changed, k) if is_augmented else None,
        )
        for k, index in enumerate(indices)
    ]
