"""What `cvlab data show` shows of a data set of captioned photos."""

from collections import Counter
from functools import partial

import torch
from PIL import Image

from cvlab.data import photos
from cvlab.experiments.captioning.dataset import CaptionDataset
from cvlab.experiments.common.data_overview import DataOverview, DataSample, Item, digest_bytes


def build(dataset: CaptionDataset, num_samples: int) -> DataOverview:
    """Return the splits and some photos with a caption."""
    items, sizes = [], Counter[tuple[int, int]]()
    for split, samples in dataset.splits.items():
        for sample in samples:
            with Image.open(sample.path) as image:
                sizes[image.size] += 1
            digest = digest_bytes(sample.path.read_bytes())
            items.append(Item(split, sample.path.name, partial(photos.load, sample.path), digest))
    train = dataset.splits["train"]
    indices = torch.linspace(0, len(train) - 1, min(num_samples, len(train))).long().tolist()
    counts = {split: sum(len(sample.captions) for sample in samples) for split, samples in dataset.splits.items()}
    lengths = [len(caption.split()) for samples in dataset.splits.values() for s in samples for caption in s.captions]
    return DataOverview(
        name=dataset.name,
        num_images={split: len(samples) for split, samples in dataset.splits.items()},
        classes={split: {"captions": count} for split, count in counts.items()},
        sizes=sizes,
        samples=[DataSample(train[k].captions[0], photos.load(train[k].path)) for k in indices],
        items=items,
        notes=(f"captions have {min(lengths)} to {max(lengths)} words, {sum(lengths) / len(lengths):.1f} on average",)
        if lengths
        else (),
    )
