"""A training task on a bundled photo with random words, of which the steps can be measured without a data set."""

from dataclasses import dataclass

import torch

from cvlab import _compat
from cvlab.data import photos
from cvlab.engine.task import TrainTask
from cvlab.experiments.captioning import feature_store, setup
from cvlab.experiments.captioning.config import SCENE_CAPTIONS, CaptionerConfig
from cvlab.experiments.captioning.dataset import CaptionDataset, CaptionSample
from cvlab.experiments.captioning.feature_store import FeatureSpec


@dataclass(frozen=True)
class TextSize:
    """Number of words of a vocabulary, of captions of each photo, and of the longest caption (None: any length)."""

    num_words: int
    captions: int
    longest: int | None


PHOTO_TEXT = TextSize(2536, 5, None)  # the words that occur five times in the training captions of Flickr8k
SCENE_TEXT = TextSize(24, 1, 8)  # of scene_captions


def synthetic_captions(text: TextSize, count: int, max_words: int) -> CaptionDataset:
    """Return `count` samples of one photo with captions of at most `max_words` words, taken in turn from all words."""
    path = _compat.sample_photo()
    longest = min(max_words, text.longest or max_words)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, longest // 2), longest + 1, (count, text.captions), generator=generator)
    word = 0
    samples = []
    for of_photo in lengths.tolist():
        captions = []
        for length in of_photo:
            captions.append(" ".join(f"word{(word + k) % text.num_words}" for k in range(length)))
            word += length
        samples.append(CaptionSample(path, tuple(captions)))
    return CaptionDataset("generated", dict.fromkeys(("train", "val"), tuple(samples)))


def build_task(config: CaptionerConfig) -> TrainTask:
    """Return the untrained captioner, its loss, and batches of one photo, whose features are computed once."""
    data = config.data.model_copy(update={"num_train": None, "extra": ()})
    config = config.model_copy(update={"data": data, "min_word_count": 1})
    text = SCENE_TEXT if config.data.name == SCENE_CAPTIONS else PHOTO_TEXT
    dataset = synthetic_captions(text, config.batch_size, config.length - 2)  # without START and END
    built = setup.build_setup(config, dataset)
    photo = photos.load(dataset.splits["train"][0].path)
    spec = FeatureSpec(not built.captioner.model.has_attention)
    features = feature_store.extract_features(built.captioner.feature_sources, [photo], built.ctx, spec).half()
    features = features.repeat(config.batch_size, 1, 1)
    mirrored = features if config.mirror else None
    training = setup.make_training_data(config, built, features, mirrored, features)
    return setup.build_task(config, built, training, lambda _: {})
