"""Measure how fast a configuration trains on this machine, and choose the profile that fits the time budget."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cvlab import console, registry
from cvlab.config.loading import Loaded
from cvlab.config.schema import DataConfig
from cvlab.data import datasets
from cvlab.data.datasets import DatasetSize
from cvlab.engine import compilation, loop, parameters, time_budget
from cvlab.experiments.classification import setup
from cvlab.experiments.classification.config import ClassifyConfig
from cvlab.experiments.classification.data.images import ImageDataset, split_sizes
from cvlab.experiments.classification.setup import ClassificationSetup

MEASURED_SECONDS = 40.0  # the time budget whose calibration is measured: about a second
NUM_SYNTHETIC_BATCHES = 4


def synthetic_images(size: DatasetSize, count: int) -> ImageDataset:
    """Return a data set of `count` images of noise with random labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, size.image_px, size.image_px, size.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, size.num_classes, (count,), generator=generator)
    return ImageDataset("noise", images, labels, images[:1], labels[:1], tuple(map(str, range(size.num_classes))))


def build_on_synthetic_images(config: ClassifyConfig, base: Path) -> ClassificationSetup:
    """Build a configuration on noise instead of its data set; the user's own data set is loaded."""
    if registry.is_user_file(config.data.name):
        return setup.build(config, base)
    dataset = synthetic_images(datasets.get(config.data.name).size, NUM_SYNTHETIC_BATCHES * config.batch_size)
    data = config.data.model_copy(update={"num_train": None, "val_fraction": 0.0})
    return setup.build(config.model_copy(update={"data": data}), base, dataset)


def train_steps(
    config: ClassifyConfig,
    built: ClassificationSetup,
    get_batch: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> Iterator[loop.Losses]:
    """Train step by step as a run of the configuration does, on its batches or on those of `get_batch`."""
    optimizer = parameters.build_optimizer(config, built.model)
    return loop.fit(
        loop.TrainState(built.model, optimizer, config.ema, built.ctx.make_scaler()),
        setup.build_loss_fn(config, built.train_loader),
        get_batch or built.train_loader.get_batch,
        lr_factor=lambda _: 1e-3,  # the weights do not matter but must stay finite
        ctx=built.ctx,
        clip_norm=config.clip_norm,
        sam=config.sam,
        split_batch=setup.batch_splitter(config.accumulate),
        forward_model=compilation.compile_model(built.model) if config.compile else None,
    )


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
