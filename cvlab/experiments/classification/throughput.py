"""How fast a classifier's configuration trains on this machine, on noise; and the profile that this allows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cvlab import console, registry
from cvlab.config.loading import Loaded
from cvlab.config.schema import DataConfig
from cvlab.data import datasets
from cvlab.data.datasets import DatasetSize
from cvlab.engine import loop, optimizers, time_budget
from cvlab.experiments.classification import train
from cvlab.experiments.classification.data.images import ImageDataset, split_sizes

MEASURED_SECONDS = 40.0  # a budget of which a measurement takes its small share, about a second
BATCHES = 4  # so many batches of images are made up


def made_up(size: DatasetSize, count: int) -> ImageDataset:
    """Return `count` images of noise to train on, with labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, size.image_px, size.image_px, size.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, size.num_classes, (count,), generator=generator)
    return ImageDataset("noise", images, labels, images[:1], labels[:1], tuple(map(str, range(size.num_classes))))


def build(config: train.ClassifyConfig, base: Path) -> train.Parts:
    """Build a configuration with noise in place of its data; the user's own data is loaded."""
    if registry.is_user_file(config.data.name):
        return train.build(config, base)
    images = made_up(datasets.get(config.data.name).size, BATCHES * config.batch_size)
    everything = config.data.model_copy(update={"num_train": None, "val_fraction": 0.0})
    return train.build(config.model_copy(update={"data": everything}), base, images)


def steps(
    config: train.ClassifyConfig, parts: train.Parts, batch_at: Callable[[int], Any] | None = None
) -> Iterator[loop.Losses]:
    """Train step after step, as a run of the configuration does, on its batches or on those of `batch_at`."""
    optimizer = optimizers.build_optimizer(config.optimizer.name, parts.model, config.optimizer.arguments())
    return loop.fit(
        loop.TrainState(parts.model, optimizer, config.ema),
        train.loss_function(config, parts.batches),
        batch_at or parts.batches,
        lr_factor=lambda _: 1e-3,  # the weights do not matter and must stay finite
        ctx=parts.ctx,
        clip_norm=config.clip_norm,
    )


def images_per_second(config: train.ClassifyConfig, parts: train.Parts) -> float:
    """Return how many images a second a configuration trains on, from the median of about a second's steps."""
    seconds = time_budget.seconds_per_step(steps(config, parts), MEASURED_SECONDS, parts.ctx.synchronize)
    return config.batch_size / seconds


def choose_profile(loaded: Loaded, data: DataConfig) -> train.ClassifyConfig:
    """Return the last profile whose epochs over `data`'s images fit into the budget; measures until one does not."""
    config = loaded.config
    assert isinstance(config, train.ClassifyConfig)
    assert config.duration.seconds is not None
    profiles: dict[str, train.ClassifyConfig] = {}
    for name in config.profiles:
        variant = loaded.variants[f"profile={name}"].config.with_data(data)
        assert isinstance(variant, train.ClassifyConfig)
        profiles[name] = variant
    chosen, *_ = profiles
    for name, profile in config.profiles.items():
        possible = _epochs_within(profiles[name], loaded.base)
        wanted = f"{profile.epochs:g} are wanted" if profile.epochs else "any number will do"
        console.info(f"profile {name}: {possible:.1f} epochs fit into {config.duration.seconds:g} s, {wanted}")
        if possible < profile.epochs:
            break
        chosen = name
    console.info(f"profile {chosen} is taken; profile=NAME takes another")
    return profiles[chosen]


def _epochs_within(config: train.ClassifyConfig, base: Path) -> float:
    num_train: float = BATCHES * config.batch_size
    if not registry.is_user_file(config.data.name):
        size = datasets.get(config.data.name).size
        num_train, _ = split_sizes(size.train_images, config.data.val_fraction, config.data.num_train)
    return images_per_second(config, build(config, base)) * (config.duration.seconds or 0) / num_train
