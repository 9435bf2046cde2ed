"""Measure how fast a configuration trains on this machine, and choose the profile that fits the time budget."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cvlab import console, registry
from cvlab.config.loading import Loaded
from cvlab.config.schema import DataConfig
from cvlab.data import datasets
from cvlab.data.datasets import DatasetSize
from cvlab.engine import loop, probe, time_budget
from cvlab.experiments.classification import setup
from cvlab.experiments.classification.config import FOLDER, ClassifyConfig
from cvlab.experiments.classification.data.images import ImageDataset, split_sizes
from cvlab.experiments.classification.setup import ClassificationSetup

MEASURED_SECONDS = 40.0  # the time budget whose calibration is measured: about a second
NUM_SYNTHETIC_BATCHES = 4
NUM_FOLDER_CLASSES = 10  # of a folder of photos, which is not read


def synthetic_images(size: DatasetSize, count: int) -> ImageDataset:
    """Return a data set of `count` images of noise with random labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, size.image_px, size.image_px, size.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, size.num_classes, (count,), generator=generator)
    return ImageDataset("noise", images, labels, images[:1], labels[:1], tuple(map(str, range(size.num_classes))))


def build_on_synthetic_images(config: ClassifyConfig, base: Path) -> ClassificationSetup:
    """Build a configuration on noise instead of its data set; the user's own function is called."""
    if registry.is_user_file(config.data.name):
        return setup.build(config, base)
    size = datasets.get(config.data.name).size
    if config.data.name == FOLDER:
        size = replace(size, channels=3, num_classes=NUM_FOLDER_CLASSES)
    if config.data.has_photos:
        size = replace(size, image_px=setup.photo_transform(config).size_px)
    backbone = setup.backbone_of(config)
    if backbone is not None:  # of which each image is computed by the whole network
        size = replace(size, image_px=backbone.transform.size_px, channels=3)
    batches = NUM_SYNTHETIC_BATCHES if backbone is None else 1
    dataset = synthetic_images(size, batches * config.batch_size)
    data = config.data.model_copy(update={"num_train": None, "val_fraction": 0.0})
    return setup.build(config.model_copy(update={"data": data}), base, dataset)


def train_steps(
    config: ClassifyConfig,
    built: ClassificationSetup,
    get_batch: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> Iterator[loop.Losses]:
    """Train step by step as a run of the configuration does, on its batches or on those of `get_batch`."""
    task = setup.build_task(config, built, lambda _: {})
    return probe.train_steps(config, task if get_batch is None else replace(task, get_batch=get_batch))[1]


def images_per_second(config: ClassifyConfig, built: ClassificationSetup) -> float:
    """Return the training throughput in images/s, from the median step time over about a second."""
    seconds = time_budget.seconds_per_step(train_steps(config, built), MEASURED_SECONDS, built.ctx.synchronize)
    return config.batch_size / seconds


def choose_profile(loaded: Loaded, data: DataConfig) -> ClassifyConfig:
    """Return the largest profile that completes its epochs on `data` within the budget; measure until one does not."""
    config = loaded.config
    assert isinstance(config, ClassifyConfig)
    assert config.duration.seconds is not None
    variants: dict[str, ClassifyConfig] = {}
    for name in config.profiles:
        variant = loaded.variants[f"profile={name}"].config.with_data(data)
        assert isinstance(variant, ClassifyConfig)
        variants[name] = variant
    chosen, *_ = variants
    for name, profile in config.profiles.items():
        epochs = _epochs_within_budget(variants[name], loaded.base)
        required = f"{profile.epochs:g} required" if profile.epochs else "any number is enough"
        console.info(f"profile {name}: {epochs:.1f} epochs fit into {config.duration.seconds:g} s, {required}")
        if epochs < profile.epochs:
            break
        chosen = name
    console.info(f"using profile {chosen}; profile=NAME selects another")
    return variants[chosen]


def _epochs_within_budget(config: ClassifyConfig, base: Path) -> float:
    num_train: float = NUM_SYNTHETIC_BATCHES * config.batch_size
    if not registry.is_user_file(config.data.name):
        size = datasets.get(config.data.name).size
        num_train, _ = split_sizes(size.train_images, config.data.val_fraction, config.data.num_train)
    speed = images_per_second(config, build_on_synthetic_images(config, base))
    return speed * (config.duration.seconds or 0) / num_train
