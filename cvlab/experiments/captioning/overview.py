"""What `cvlab data show` shows of a data set of captioned photos."""

import torch

from cvlab.data import photos
from cvlab.experiments.captioning.dataset import CaptionDataset
from cvlab.experiments.common.data_overview import DataOverview, DataSample, photo_items


def build(dataset: CaptionDataset, num_samples: int) -> DataOverview:
    """Return the splits and some photos with a caption."""
    paths = {split: [sample.path for sample in samples] for split, samples in dataset.splits.items()}
    items, sizes = photo_items(paths)
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
