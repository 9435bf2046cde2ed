"""Train an image classifier: any model, optimizer, schedule and data set.

References: EECS 498/598 (Johnson, University of Michigan, 2019), assignments 3 and 4.
Metrics: `train_accuracy`, `val_accuracy`, and `test_accuracy` where `evaluate_test` is set.
Command: cvlab train configs/cifar_bn.yaml
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Le
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cvlab import layers, registry
from cvlab.config import schema
from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric
from cvlab.data import datasets
from cvlab.data.datasets import DatasetSize
from cvlab.data.resolve import DownloadPolicy
from cvlab.engine import device, loop, optimizers, trainer
from cvlab.engine.config import TrainConfig
from cvlab.engine.task import ExportSpec, TrainTask
from cvlab.errors import ConfigError
from cvlab.experiments.base import Evaluable, Experiment, Exportable, State
from cvlab.experiments.classification.data.augment import Augmentation, views
from cvlab.experiments.classification.data.hard_examples import HardExampleLoader
from cvlab.experiments.classification.data.images import (
    ImageDataset,
    ImageDatasetSource,
    TrainLoader,
    eval_batches,
    normalization,
    size_of,
    split,
    split_sizes,
    steps_in_epoch,
)
from cvlab.experiments.classification.models import registry as model_registry
from cvlab.experiments.classification.profiles import AUTO, Profile, expand_profiles
from cvlab.models.pretrained import NormalizedModel
from cvlab.runs import checkpoint
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

TRAIN_EVALUATED = 10_000  # of a larger training set the first so many are evaluated
FITTED_TO = 5_000  # so many training images are shown to a model that sets weights by them before it is trained


class Data(schema.DataConfig):
    """Which images, and how many of them."""

    num_train: schema.PositiveInt | None = Field(None, description="train on the first so many; null: on all")
    val_fraction: schema.FractionBelowOne = Field(
        0.2, description="the last share of the training images is validation; 0: none, all are trained on"
    )
    normalize: Literal["mean", "mean_std"] = Field(
        "mean", description="subtract the mean, or divide by the deviation too"
    )

    @field_validator("name", "fallback")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and not registry.is_user_file(name):
            datasets.check_kind(name, ImageDatasetSource)
        return name


class Augment(schema.FrozenModel):
    """Random changes of the training images."""

    flip: bool | Literal["alternating"] = Field(
        False, description="mirror images at random; alternating: at random in the first epoch, then in turn"
    )
    translate_px: Annotated[schema.NonNegativeInt, Le(16)] = Field(0, description="shift by up to so many pixels")
    cutout_px: schema.NonNegativeInt = Field(0, description="blank out a square with sides of so many pixels")


class ClassifyConfig(TrainConfig):
    """One classifier on one data set."""

    profile: str = Field(AUTO, description="one of `profiles`; auto: measure, and take the last that fits the budget")
    profiles: dict[str, Profile] = Field({}, description="sizes of the experiment by name, the smallest first")

    data: Data
    model: Annotated[schema.ComponentConfig, model_registry.TABLE]
    layers: str = Field("torch", description="whose layers: a namespace of cvlab.layers")
    reg: schema.NonNegativeFloat = Field(
        0.0, description="loss + reg * sum(W^2), over weights, not biases, gamma, beta"
    )
    label_smoothing: schema.FractionBelowOne = Field(0.0, description="share of the target spread over all classes")
    augment: Augment = Field(Augment())
    skip_easy: schema.FractionBelowOne = Field(
        0.0, description="after the first pass leave out this share of the images, those whose loss was smallest"
    )
    evaluate_test: bool = Field(False, description="report test_accuracy at the end; choose on validation")
    tta: Literal["none", "flip", "flip_shift"] = Field(
        "none", description="test-time augmentation: report *_accuracy_tta too, the scores averaged over several views"
    )

    @model_validator(mode="after")
    def _can_choose(self) -> "ClassifyConfig":
        if self.profiles and self.profile == AUTO and self.duration.seconds is None:
            raise ValueError(f"auto needs a budget in duration.seconds; else name one of {', '.join(self.profiles)}")
        return self

    @field_validator("layers")
    @classmethod
    def _known_layers(cls, name: str) -> str:
        if name not in layers.LAYERS:
            raise ValueError(str(registry.unknown_name_error("layers", name, layers.LAYERS)))
        return name


@dataclass(frozen=True)
class Parts:
    """What a configuration builds."""

    ctx: device.ComputeContext
    images: ImageDataset
    model: nn.Module
    batches: TrainLoader
    splits: dict[str, tuple[Tensor, Tensor]]


def build(config: ClassifyConfig, base: Path, images: ImageDataset | None = None) -> Parts:
    """Load the data, unless `images` are given, and build the model, seeded; user files are relative to `base`."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    images = (
        images
        or _user_images(config, base)
        or datasets.get_of_kind(config.data.name, ImageDatasetSource).load(data_root())
    )
    splits = split(images, config.data.val_fraction, config.data.num_train)
    splits = {name: (x.to(ctx.device), y.to(ctx.device)) for name, (x, y) in splits.items()}
    normalize = normalization(images.train_images, config.data.normalize, ctx.dtype, ctx.device)
    augment = Augmentation(**config.augment.model_dump())
    kind = functools.partial(HardExampleLoader, skip_easy=config.skip_easy) if config.skip_easy else TrainLoader
    batches = kind(*splits["train"], config.batch_size, config.seed, normalize, augment)
    model = build_model(config, base, size_of(images))
    model = model.to(ctx.device, ctx.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if hasattr(model, "fit_to"):
        model.fit_to(normalize(splits["train"][0][:FITTED_TO].permute(0, 3, 1, 2)))
    return Parts(ctx, images, model, batches, splits)


def _user_images(config: ClassifyConfig, base: Path) -> ImageDataset | None:
    """Return what the user's own function gives, where the configuration names one."""
    if not registry.is_user_file(config.data.name):
        return None
    images = registry.import_user_object(config.data.name, base)()
    if not isinstance(images, ImageDataset):
        raise ConfigError(f"data {config.data.name}: expected a cvlab.ImageDataset, got {type(images).__name__}")
    return images


def build_model(config: ClassifyConfig, base: Path, size: DatasetSize) -> nn.Module:
    """Build the model of a configuration for images of a size, on the CPU, its weights drawn from the seed."""
    for key in ("translate_px", "cutout_px"):
        if (given := getattr(config.augment, key)) >= size.image_px:
            raise ConfigError(f"augment.{key} {given}: the images have {size.image_px} px")
    device.seed_everything(config.seed)
    shape = {"in_channels": size.channels, "image_size": size.image_px, "num_classes": size.num_classes}
    namespace = registry.get("layers", config.layers, layers.LAYERS)
    model = model_registry.build(config.model.name, config.model.arguments(), base, layers=namespace, **shape)
    model_registry.require_scores(model, config.model.name, **shape)
    return model


def monitor(config: ClassifyConfig) -> str:
    """Return the metric that says which weights are best."""
    return "val_accuracy" if config.data.val_fraction else "train_accuracy"


def loss_function(config: ClassifyConfig, batches: TrainLoader) -> loop.LossFn[tuple[Tensor, Tensor]]:
    """Return the training loss: cross-entropy plus reg * sum(W^2), with the accuracy on the batch beside it.

    Batches that choose by loss are told the cross-entropy of each image.
    """

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> loop.Losses:
        images, labels = batch
        scores = model(images)
        loss = F.cross_entropy(_wide(scores), labels, label_smoothing=config.label_smoothing)
        if config.reg > 0:
            weights = [p for p in model.parameters() if p.ndim > 1]
            loss = loss + config.reg * torch.stack([w.square().sum() for w in weights]).sum()
        if isinstance(batches, HardExampleLoader):
            batches.record(F.cross_entropy(_wide(scores.detach()), labels, reduction="none"))
        return {"loss": loss, "batch_accuracy": (scores.detach().argmax(1) == labels).float().mean()}

    return loss_fn


def _wide(scores: Tensor) -> Tensor:
    """Take the loss in float32 at least."""
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


def measure(model: nn.Module, batch: tuple[Tensor, Tensor], tta: str = "none") -> dict[str, Tensor]:
    """Return sums over a batch: of the cross-entropy, of right answers (of `tta`'s views too), of images."""
    images, labels = batch
    scores = _wide(model(images))
    sums = {
        "loss": F.cross_entropy(scores, labels, reduction="sum"),
        "accuracy": (scores.argmax(1) == labels).sum(),
        "count": torch.tensor(len(labels)),
    }
    if tta != "none":
        weighted = [weight * _wide(model(view)) for weight, view in views(images, tta)]
        sums["accuracy_tta"] = (torch.stack(weighted).sum(0).argmax(1) == labels).sum()
    return sums


def _evaluator(parts: Parts, tta: str) -> Callable[[nn.Module, str], dict[str, float]]:
    def evaluate(model: nn.Module, name: str) -> dict[str, float]:
        images, labels = parts.splits[name]
        limit = TRAIN_EVALUATED if name == "train" else len(images)
        batches = eval_batches(images[:limit], labels[:limit], parts.batches.normalize)
        measured = functools.partial(measure, tta="none" if name == "train" else tta)
        found = loop.evaluate(model, batches, measured, parts.ctx)
        return {f"{name}_{key}": value for key, value in found.items()}

    return evaluate


def _has_val(config: ClassifyConfig) -> bool:
    return config.data.val_fraction > 0


def _has_test(config: ClassifyConfig) -> bool:
    return config.evaluate_test


class ClassifyExperiment(Experiment[ClassifyConfig], Evaluable[ClassifyConfig], Exportable[ClassifyConfig]):
    """Train an image classifier: any model, optimizer, schedule and data set."""

    name = "classify"
    Config = ClassifyConfig
    metrics = (
        *trainer.METRICS,
        Metric("train_accuracy", "fraction", "higher"),
        Metric("best_train_accuracy", "fraction", "higher", lambda config: not config.data.val_fraction),
        Metric("best_val_accuracy", "fraction", "higher", _has_val),
        Metric("val_loss", better="lower", when=_has_val),
        Metric("val_accuracy", "fraction", "higher", _has_val),
        Metric("val_accuracy_tta", "fraction", "higher", lambda config: _has_val(config) and config.tta != "none"),
        Metric("test_loss", better="lower", when=_has_test),
        Metric("test_accuracy", "fraction", "higher", _has_test),
        Metric("test_accuracy_tta", "fraction", "higher", lambda config: _has_test(config) and config.tta != "none"),
    )

    def expand(self, raw: dict[str, Any], overrides: Sequence[str], place: Callable[[str], str]) -> Sequence[str]:
        """Apply the profile that is named; return one override for each profile if none is."""
        return expand_profiles(raw, overrides, place)

    def prepare(self, loaded: Loaded, policy: DownloadPolicy) -> ClassifyConfig:
        """Return the configuration to run: its data set resolved, its profile chosen by measuring."""
        config = super().prepare(loaded, policy)
        if not loaded.variants:
            return config
        from cvlab.experiments.classification import throughput

        return throughput.choose_profile(loaded, config.data)

    def run(self, config: ClassifyConfig, run: RunDir) -> dict[str, float]:
        """Train, or go on training; return the metrics."""
        parts = build(config, run.path)
        evaluate = _evaluator(parts, config.tta)

        def evaluation(model: nn.Module) -> dict[str, float]:
            train = evaluate(model, "train")
            val = evaluate(model, "val") if "val" in parts.splits else {}
            return {"train_accuracy": train["train_accuracy"], **val}

        job = TrainTask(
            model=parts.model,
            loss_fn=loss_function(config, parts.batches),
            get_batch=parts.batches,
            steps_per_epoch=parts.batches.steps_per_epoch,
            items_per_step=config.batch_size,
            evaluate=evaluation,
            extra_state=getattr(parts.batches, "memory", {}),
            monitor=monitor(config),
            ctx=parts.ctx,
        )
        model, metrics = trainer.train(config, job, run)
        return metrics | (evaluate(model, "test") if config.evaluate_test else {})

    def export_spec(self, config: ClassifyConfig, base: Path, state: State) -> ExportSpec:
        """Return the net of a checkpoint, which takes images in [0, 1]: the normalisation is inside."""
        parts = build(config, base)
        checkpoint.load_eval_weights(parts.model, state, str(base))
        size = size_of(parts.images)
        normalize = parts.batches.normalize
        mean, std = normalize.mean_and_std()
        net = NormalizedModel(parts.model, mean, std)
        about = {
            "takes": f"images, float32 (N, {size.channels}, {size.image_px}, {size.image_px}) in [0, 1]",
            "gives": f"scores (N, {size.num_classes}), before the softmax",
            "normalised_inside": {"mean": mean, "std": std},
            "classes": parts.images.classes,
        }
        example = torch.rand(1, size.channels, size.image_px, size.image_px)
        return ExportSpec(net, parts.model, example, ("scores",), about)

    def plan(self, config: ClassifyConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do, without loading or writing anything; a user's own data has to be loaded."""
        ctx = device.select_device(config.device, config.precision, config.threads)
        own = _user_images(config, base)
        size = size_of(own) if own else datasets.get(config.data.name).size
        model = build_model(config, base, size)
        optimizers.build_optimizer(config.optimizer.name, model, config.optimizer.arguments())
        num_train, num_val = split_sizes(size.train_images, config.data.val_fraction, config.data.num_train)
        steps_per_epoch = steps_in_epoch(num_train, config.batch_size)
        steps = config.duration.steps or (config.duration.epochs or 0) * steps_per_epoch
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_images": num_train,
            "val_images": num_val,
            "steps_per_epoch": steps_per_epoch,
            "steps": steps or f"as many as fit in {config.duration.seconds:g} s",
            **ctx.as_dict(),
        }

    def evaluate(self, config: ClassifyConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint on splits; on validation and test if none is given."""
        parts = build(config, base)
        checkpoint.load_eval_weights(parts.model, state, str(base))
        evaluate = _evaluator(parts, config.tta)
        splits = splits or tuple(name for name in ("val", "test") if name in parts.splits)
        unknown = [name for name in splits if name not in parts.splits]
        if unknown:
            raise ConfigError(f"unknown split {unknown[0]!r}", f"known: {', '.join(parts.splits)}")
        found: dict[str, float] = {}
        for name in splits:
            found |= evaluate(parts.model, name)
        return found
