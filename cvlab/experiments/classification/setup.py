"""What a classification configuration builds: data, model, loss and evaluation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab import layers, registry
from cvlab.config.metrics import require_finite
from cvlab.data import datasets
from cvlab.data.datasets import DatasetSize
from cvlab.engine import device, loop
from cvlab.errors import ConfigError
from cvlab.experiments.classification.config import ClassifyConfig
from cvlab.experiments.classification.data.augment import Augmentation, tta_views
from cvlab.experiments.classification.data.hard_examples import HardExampleLoader
from cvlab.experiments.classification.data.images import (
    ImageDataset,
    ImageDatasetSource,
    TrainLoader,
    build_normalization,
    dataset_size,
    eval_batches,
    split,
)
from cvlab.experiments.classification.models import checks
from cvlab.experiments.classification.models import registry as model_registry
from cvlab.storage.cache import data_root

MAX_TRAIN_EVAL_IMAGES = 10_000  # train_accuracy is that of the first N training images
MAX_INIT_IMAGES = 5_000  # training images for a model that initializes weights from data


@dataclass(frozen=True)
class ClassificationSetup:
    """Data and model of a classification experiment, on its device.

    Attributes:
        ctx: Device and precision.
        dataset: The data set, on the CPU.
        model: The initialized model.
        train_loader: The training batches.
        splits: Images, uint8 (N, H, W, C), and labels, int64 (N,), of `train`, `val` (if present) and `test`.
    """

    ctx: device.ComputeContext
    dataset: ImageDataset
    model: nn.Module
    train_loader: TrainLoader
    splits: dict[str, tuple[Tensor, Tensor]]


def build(config: ClassifyConfig, base: Path, dataset: ImageDataset | None = None) -> ClassificationSetup:
    """Load the data and build the seeded model.

    Args:
        config: The configuration.
        base: The folder that paths to user files are relative to.
        dataset: Used instead of the data set that the configuration names.

    Returns:
        Data and model.
    """
    ctx = device.select_device(config.device, config.precision, config.threads)
    dataset = dataset or load_user_dataset(config, base) or _load_dataset(config)
    splits = split(dataset, config.data.val_fraction, config.data.num_train)
    splits = {name: (x.to(ctx.device), y.to(ctx.device)) for name, (x, y) in splits.items()}
    normalize = build_normalization(dataset.train_images, config.data.normalize, ctx.dtype, ctx.device)
    augment = Augmentation(**config.augment.model_dump())
    loader = functools.partial(HardExampleLoader, skip_easy=config.skip_easy) if config.skip_easy else TrainLoader
    train_loader = loader(*splits["train"], config.batch_size, config.seed, normalize, augment)
    model = build_model(config, base, dataset_size(dataset))
    model = model.to(ctx.device, ctx.dtype)
    if hasattr(model, "init_from_images"):
        model.init_from_images(normalize(splits["train"][0][:MAX_INIT_IMAGES].permute(0, 3, 1, 2)))  # type: ignore[operator]
    return ClassificationSetup(ctx, dataset, model, train_loader, splits)


def _load_dataset(config: ClassifyConfig) -> ImageDataset:
    return datasets.get_of_kind(config.data.name, ImageDatasetSource).load(data_root())


def load_user_dataset(config: ClassifyConfig, base: Path) -> ImageDataset | None:
    """Return the data set of the user's own function, or None if the configuration names no such function."""
    if not registry.is_user_file(config.data.name):
        return None
    dataset = registry.import_user_object(config.data.name, base)()
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(f"data {config.data.name}: expected a cvlab.ImageDataset, got {type(dataset).__name__}")
    return dataset


def build_model(config: ClassifyConfig, base: Path, size: DatasetSize) -> nn.Module:
    """Build and check the model for a data set of a size, on the CPU, with weights initialized from the seed."""
    for key in ("translate_px", "cutout_px"):
        if (pixels := getattr(config.augment, key)) >= size.image_px:
            raise ConfigError(f"augment.{key} {pixels}: the images have {size.image_px} px")
    device.seed_everything(config.seed)
    shape = {"in_channels": size.channels, "image_size": size.image_px, "num_classes": size.num_classes}
    namespace = registry.get("layers", config.layers, layers.LAYERS)
    model = model_registry.build(config.model.name, config.model.builder_arguments(), base, layers=namespace, **shape)
    return checks.prepare(model, config.model.name, config.batch_size, **shape)


def build_loss_fn(config: ClassifyConfig, train_loader: TrainLoader) -> loop.LossFn[tuple[Tensor, Tensor]]:
    """Return the training loss: cross-entropy + reg * sum(W^2), and the accuracy on the batch.

    A `HardExampleLoader` records the cross-entropy of each image.
    """

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> loop.Losses:
        images, labels = batch
        logits = model(images)
        loss = F.cross_entropy(_at_least_float32(logits), labels, label_smoothing=config.label_smoothing)
        if config.reg > 0:
            weights = [p for p in model.parameters() if p.ndim > 1]
            loss = loss + config.reg * torch.stack([w.square().sum() for w in weights]).sum()
        if isinstance(train_loader, HardExampleLoader):
            train_loader.record(F.cross_entropy(_at_least_float32(logits.detach()), labels, reduction="none"))
        return {"loss": loss, "batch_accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    return loss_fn


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def compute_metrics(model: nn.Module, batch: tuple[Tensor, Tensor], tta: str = "none") -> dict[str, Tensor]:
    """Return sums over a batch: cross-entropy, correct predictions (also with test-time augmentation), image count."""
    images, labels = batch
    views = [] if tta == "none" else tta_views(images, tta)
    logits = _at_least_float32(model(images.clone() if views else images))  # a model may change its input in place
    sums = {
        "loss": F.cross_entropy(logits, labels, reduction="sum"),
        "accuracy": (logits.argmax(1) == labels).sum(),
        "count": torch.tensor(len(labels)),
    }
    if views:
        weighted = [weight * _at_least_float32(model(view.clone())) for weight, view in views]
        sums["accuracy_tta"] = (torch.stack(weighted).sum(0).argmax(1) == labels).sum()
    return sums


def build_evaluator(setup: ClassificationSetup, tta: str) -> Callable[[nn.Module, str], dict[str, float]]:
    """Return a function that evaluates a model on a split; each metric's name is preceded by the split."""

    def evaluate(model: nn.Module, split_name: str) -> dict[str, float]:
        is_train = split_name == "train"
        images, labels = setup.splits[split_name]
        limit = MAX_TRAIN_EVAL_IMAGES if is_train else len(images)
        batches = eval_batches(images[:limit], labels[:limit], setup.train_loader.normalize)
        metrics_fn = functools.partial(compute_metrics, tta="none" if is_train else tta)
        metrics = loop.evaluate(model, batches, metrics_fn, setup.ctx)
        metrics = {f"{split_name}_{key}": value for key, value in metrics.items()}
        require_finite(metrics)
        return metrics

    return evaluate
