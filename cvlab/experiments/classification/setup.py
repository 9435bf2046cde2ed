"""What a classification configuration builds: data, model, loss and evaluation."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab import console, layers, registry
from cvlab.config.metrics import require_finite
from cvlab.data import datasets
from cvlab.data.datasets import DatasetSize
from cvlab.engine import device, loop
from cvlab.engine.device import upcast
from cvlab.engine.task import TrainTask
from cvlab.errors import ConfigError
from cvlab.experiments.classification import losses
from cvlab.experiments.classification.adversarial_training import Adversary, logits_of_pixels, robust_accuracy
from cvlab.experiments.classification.config import ClassifyConfig, ImageDataConfig
from cvlab.experiments.classification.data import folder
from cvlab.experiments.classification.data.augment import Augmentation, tta_views
from cvlab.experiments.classification.data.features import FeatureLoader, FeatureStore, Views
from cvlab.experiments.classification.data.hard_examples import HardExampleLoader
from cvlab.experiments.classification.data.images import (
    ImageDataset,
    ImageDatasetSource,
    Images,
    Normalization,
    TrainLoader,
    build_normalization,
    dataset_size,
    default_eval_batch_size,
    eval_batches,
    normalization,
    select_rows,
    split,
    split_sizes,
)
from cvlab.experiments.classification.models import checks
from cvlab.experiments.classification.models import registry as model_registry
from cvlab.experiments.classification.models.transfer import TransferClassifier
from cvlab.experiments.common.labeled_classifier import LabeledClassifier, LabeledImages
from cvlab.models import pretrained
from cvlab.models.pretrained import Preprocessing, PretrainedClassifier
from cvlab.ops.resample import EvalTransform
from cvlab.storage.cache import data_root

DEFAULT_IMAGE_PX = 64  # of photos, for models that take any size
MAX_TRAIN_EVAL_IMAGES = 10_000  # train_accuracy is that of the first N training images
ROBUST_METRIC = "val_robust_accuracy"
MAX_INIT_IMAGES = 5_000  # training images for a model that initializes weights from data


@dataclass(frozen=True)
class ClassificationSetup:
    """Data and model of a classification experiment, on its device.

    Attributes:
        ctx: Device and precision.
        dataset: The data set, on the CPU.
        model: The initialized model.
        splits: Images, uint8 (N, H, W, C), and labels, int64 (N,), of `train`, `val` and `test` (if present).
        normalize: The normalization of the images.
        train_loader: The training batches.
        eval_batch_size: Images per batch of an evaluation, of this rank.
        stores: The features of the images by split, if the model is a `TransferClassifier`.
    """

    ctx: device.ComputeContext
    dataset: ImageDataset
    model: nn.Module
    splits: dict[str, tuple[Images, Tensor]]
    normalize: Normalization
    train_loader: TrainLoader
    eval_batch_size: int
    stores: dict[str, FeatureStore] = field(default_factory=dict)

    @property
    def is_finetuning(self) -> bool:
        """Whether the backbone of a `TransferClassifier` is trained, at some time."""
        return isinstance(self.train_loader, FeatureLoader) and self.train_loader.finetune_from is not None

    def eval_batches(self, split_name: str, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's shard of a split in order: what the model takes and labels (N,)."""
        images, labels = self.splits[split_name]
        if split_name in self.stores:
            part = "maps" if self.is_finetuning else "features"
            return self.stores[split_name].batches(part, labels, limit, self.eval_batch_size)
        return eval_batches(select_rows(images, slice(limit)), labels[:limit], self.normalize, self.eval_batch_size)


def build(
    config: ClassifyConfig,
    base: Path,
    dataset: ImageDataset | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
    is_restored: bool = False,
) -> ClassificationSetup:
    """Load the data and build the seeded model.

    Args:
        config: The configuration.
        base: The folder that paths to user files are relative to.
        dataset: Used instead of the data set that the configuration names.
        check_interrupt: Called often while photos are decoded and features computed; may raise to stop.
        is_restored: See `build_model`.

    Returns:
        Data and model.
    """
    ctx = config.compute_context()
    dataset = dataset or load_dataset(config, base, check_interrupt)
    splits = split(dataset, config.data.val_fraction, config.data.num_train)
    if config.evaluate_test and "test" not in splits and not is_restored:
        console.info(f"warning: {dataset.name} has no test split; it is not evaluated")
    if config.adversarial is not None and config.evaluates_robustness and "val" not in splits and not is_restored:
        console.info("warning: there is no val split, so val_robust_accuracy is not measured")
    splits = {name: (x.to(ctx.device), y.to(ctx.device)) for name, (x, y) in splits.items()}
    normalize = _normalization(config, dataset, ctx)
    model = build_model(config, base, dataset_size(dataset), is_restored).to(ctx.device, ctx.dtype)
    images, labels = splits["train"]
    if hasattr(model, "init_from_images"):
        model.init_from_images(normalize(images[:MAX_INIT_IMAGES].permute(0, 3, 1, 2)))  # type: ignore[operator]
    eval_batch_size = config.eval_batch_size or default_eval_batch_size(images, config.batch_size)
    augment = Augmentation(**config.augment.model_dump())
    if isinstance(model, TransferClassifier):
        stores = _feature_stores(config, model, splits, augment, normalize, ctx, check_interrupt)
        feature_loader = FeatureLoader(stores["train"], labels, config.batch_size, config.seed)
        feature_loader.sampling = config.data.sampling
        feature_loader.finetune_from = _finetune_from(config, feature_loader.steps_per_epoch)
        return ClassificationSetup(ctx, dataset, model, splits, normalize, feature_loader, eval_batch_size, stores)
    loader = functools.partial(HardExampleLoader, skip_easy=config.skip_easy) if config.skip_easy else TrainLoader
    train_loader = loader(images, labels, config.batch_size, config.seed, normalize, augment)
    train_loader.num_classes = len(dataset.classes)
    train_loader.sampling = config.data.sampling
    return ClassificationSetup(ctx, dataset, model, splits, normalize, train_loader, eval_batch_size)


def labeled_classifier(setup: ClassificationSetup, split_name: str) -> LabeledClassifier:
    """Return the model, in evaluation mode and without gradients of its weights, for images of a split in [0, 1]."""
    model = setup.model.eval().requires_grad_(False)
    images, labels = setup.splits[split_name]

    def get_images(rows: slice) -> Tensor:
        pixels = images[rows]
        assert isinstance(pixels, Tensor)
        return pixels

    dataset = setup.dataset
    logits_fn = logits_of_pixels(model, setup.normalize)
    return LabeledClassifier(logits_fn, get_images, labels, dataset.classes, dataset.name, setup.ctx.device)


def labeled_images(
    config: ClassifyConfig, base: Path, split_name: str | None, check_interrupt: Callable[[], None]
) -> LabeledImages:
    """Return the images of a split; None: of `val`, or of `train` if there is none."""
    dataset = load_dataset(config, base, check_interrupt)
    splits = split(dataset, config.data.val_fraction, config.data.num_train)
    split_name = split_name or ("val" if "val" in splits else "train")
    require_splits([split_name], splits)
    images, labels = splits[split_name]
    return LabeledImages(images.__getitem__, labels, dataset.classes, dataset.name, split_name)


def require_splits(names: Sequence[str], splits: Collection[str]) -> None:
    """Raise ConfigError unless all names are those of splits."""
    missing = [name for name in names if name not in splits]
    if missing and missing[0] in ("val", "test"):
        raise ConfigError(
            f"the data has no {missing[0]} split",
            f"name another one ({', '.join(splits)}), or train with data.{missing[0]}_fraction=0.2",
        )
    if missing:
        raise ConfigError(f"unknown split {missing[0]!r}", f"known: {', '.join(splits)}")


def _normalization(config: ClassifyConfig, dataset: ImageDataset, ctx: device.ComputeContext) -> Normalization:
    """Return the normalization of a pretrained model's images, else that of the training images."""
    about = preprocessing_of(config)
    if about is not None:
        return normalization(about.mean, about.std, ctx.dtype, ctx.device)
    return build_normalization(dataset.train_images, config.data.normalize, ctx.dtype, ctx.device)


def _feature_stores(
    config: ClassifyConfig,
    model: TransferClassifier,
    splits: dict[str, tuple[Images, Tensor]],
    augment: Augmentation,
    normalize: Normalization,
    ctx: device.ComputeContext,
    check_interrupt: Callable[[], None],
) -> dict[str, FeatureStore]:
    """Compute the features that training and validation need, and standardize the model's by them."""
    num_views = config.model.builder_arguments()["views"]
    stores: dict[str, FeatureStore] = {}
    for name in ("train", "val"):
        if name in splits:
            views = Views(num_views if name == "train" else 1, augment, config.seed)
            stores[name] = FeatureStore(model, splits[name][0], views, normalize, ctx, name, check_interrupt)
            if name == "train":
                model.standardize(stores[name].rows("features"))
            stores[name].rows("maps" if config.finetune_epochs else "features")
    return stores


def _finetune_from(config: ClassifyConfig, steps_per_epoch: int) -> int | None:
    """Return the step from which on the backbone's last stages are trained, None if they never are."""
    if not config.finetune_epochs:
        return None
    return max(0, config.duration.num_steps(steps_per_epoch) - config.finetune_epochs * steps_per_epoch)


def load_dataset(
    config: ClassifyConfig, base: Path, check_interrupt: Callable[[], None] = lambda: None
) -> ImageDataset:
    """Load the data set that a configuration names; the images of a pretrained model are as it takes them."""
    dataset = load_user_dataset(config.data.name, base)
    if dataset is None and config.data.has_photos:
        dataset = folder.load(list_photos(config.data), photo_transform(config), check_interrupt)
    elif dataset is None:
        dataset = datasets.get_of_kind(config.data.name, ImageDatasetSource).load(data_root())
    backbone = backbone_of(config)
    if backbone is not None and dataset.transform != backbone.transform:
        dataset = dataset.transformed(backbone.transform)
    return dataset


def list_photos(data: ImageDataConfig) -> folder.PhotoListing:
    """List the photos that a configuration names."""
    split_config = folder.SplitConfig(data.val_fraction, data.test_fraction, data.split_seed)
    source = datasets.get_of_kind(data.name, folder.PhotoSource)
    return source.list_photos(data_root(), Path(data.path) if data.path else None, split_config)


def photo_transform(config: ClassifyConfig) -> EvalTransform:
    """Return how photos become images: as the pretrained model takes them, else resized and cropped to image_px."""
    about, size = preprocessing_of(config), config.data.image_px
    if about is None:
        size = size or DEFAULT_IMAGE_PX
        return EvalTransform(size, size)
    transform = about.transform
    if size in (None, transform.size_px):
        return transform
    return replace(transform, size_px=size, resize_px=round(size * transform.resize_px / transform.size_px))


def load_user_dataset(name: str, base: Path) -> ImageDataset | None:
    """Return the data set of the user's own function, or None if `name` is none."""
    if not registry.is_user_file(name):
        return None
    dataset = registry.import_user_object(name, base)()
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(f"data {name}: expected a cvlab.ImageDataset, got {type(dataset).__name__}")
    return dataset


def expected_size(config: ClassifyConfig, base: Path) -> tuple[DatasetSize, dict[str, int]]:
    """Return the size of the data set, and the number of images of each split, without decoding photos.

    Raises:
        ConfigError: A split would be empty, or the training split has fewer than `num_train` images.
    """
    dataset, backbone, data = load_user_dataset(config.data.name, base), backbone_of(config), config.data
    num_val: int | None = None
    if dataset is not None:
        size = dataset_size(dataset)
        num_val = None if dataset.val_images is None else len(dataset.val_images)
    elif data.has_photos:
        listing = list_photos(data)
        num_val = listing.count("val")
        num_train, num_test = listing.count("train"), listing.count("test")
        size = DatasetSize(num_train, num_test, photo_transform(config).size_px, 3, len(listing.classes))
    else:
        size = datasets.get(data.name).size
    if num_val is None:
        num_train, num_val = split_sizes(size.train_images, data.val_fraction, data.num_train)
    else:
        num_train, _ = split_sizes(size.train_images, 0.0, data.num_train)
    size = size if backbone is None else replace(size, image_px=backbone.transform.size_px, channels=3)
    return size, {"train": num_train, "val": num_val, "test": size.test_images}


def preprocessing_of(config: ClassifyConfig) -> Preprocessing | None:
    """Return how the pretrained network takes images that a configuration starts from; None if it starts from none."""
    arguments = config.model.builder_arguments()
    if config.is_transfer:
        return pretrained.preprocessing(arguments["backbone"])
    return pretrained.preprocessing(config.model.name) if config.is_pretrained else None


def backbone_of(config: ClassifyConfig) -> PretrainedClassifier | None:
    """Return the pretrained network that a configuration builds on; None if it builds on none."""
    if not config.is_transfer:
        return None
    arguments = config.model.builder_arguments()
    return pretrained.build(arguments["backbone"], arguments["weights"])


def build_model(config: ClassifyConfig, base: Path, size: DatasetSize, is_restored: bool = False) -> nn.Module:
    """Build and check the model for a data set of a size, on the CPU, with weights initialized from the seed.

    Args:
        config: The configuration.
        base: The folder that paths to user files are relative to.
        size: Size of the data set.
        is_restored: The weights will be those of a checkpoint, so the file of pretrained ones need not be there.
    """
    for key in ("translate_px", "cutout_px"):
        if (pixels := getattr(config.augment, key)) >= size.image_px:
            raise ConfigError(f"augment.{key} {pixels}: the images have {size.image_px} px")
    if (config.augment.color or config.augment.policy) and size.channels not in (1, 3):
        raise ConfigError(f"augment.color and policy: the images have {size.channels} channels", "they take 1 or 3")
    device.seed_everything(config.seed)
    shape = {"in_channels": size.channels, "image_size": size.image_px, "num_classes": size.num_classes}
    namespace = registry.get("layers", config.layers, layers.LAYERS)
    arguments = config.model.builder_arguments()
    if is_restored and config.is_pretrained:
        arguments["weights"] = None
    model = model_registry.build(config.model.name, arguments, base, layers=namespace, **shape)
    if isinstance(model, TransferClassifier):  # checked when it was split
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return checks.prepare(model, config.model.name, config.batch_size // config.accumulate, **shape)


def batch_splitter(count: int) -> Callable[[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] | None:
    """Return what splits a batch into `count` equal parts; None for one part."""

    def split_batch(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        images, labels = batch
        return list(zip(images.chunk(count), labels.chunk(count), strict=True))

    return split_batch if count > 1 else None


def build_task(
    config: ClassifyConfig, setup: ClassificationSetup, evaluate: Callable[[nn.Module], dict[str, float]]
) -> TrainTask:
    """Return what is trained: the model, its loss and its batches."""
    adversary: Adversary | None = None
    if config.adversarial is not None:
        adversary = Adversary(config.adversarial, setup.normalize, config.seed, config.accumulate)
    return TrainTask(
        model=setup.model,
        loss_fn=build_loss_fn(config, setup.train_loader),
        get_batch=setup.train_loader.get_batch,
        steps_per_epoch=setup.train_loader.steps_per_epoch,
        items_per_step=config.batch_size,
        evaluate=evaluate,
        extra_state=setup.train_loader.extra_state,
        split_batch=batch_splitter(config.accumulate),
        data_digest=setup.dataset.digest(),
        monitor=_monitor(config, setup),
        ctx=setup.ctx,
        attack=adversary,
    )


def _monitor(config: ClassifyConfig, setup: ClassificationSetup) -> str:
    """Return the metric by which the best weights are chosen."""
    if "val" not in setup.splits:
        return "train_accuracy"
    return ROBUST_METRIC if config.evaluates_robustness else "val_accuracy"


def build_loss_fn(config: ClassifyConfig, train_loader: TrainLoader) -> loop.LossFn[tuple[Tensor, Tensor]]:
    """Return the training loss: that of `config.loss` + reg * sum(W^2), and the accuracy on the batch.

    A `HardExampleLoader` records the cross-entropy of each image. Labels are classes (N,), or probabilities of classes
    (N, K) of mixtures, whose accuracy is the probability of the predicted class.
    """
    arguments = config.loss.builder_arguments()
    if config.loss.name != losses.SVM:
        arguments["label_smoothing"] = config.label_smoothing
    class_loss: losses.ClassLoss = registry.get("loss", config.loss.name, losses.LOSSES.names)(**arguments)
    weights_of_classes: Tensor | None = None
    if config.class_weights == "balanced":
        weights_of_classes = balanced_weights(train_loader.labels, train_loader.num_classes)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> loop.Losses:
        images, labels = batch
        logits = model(images)
        logits32 = upcast(logits)
        weights_of_images: Tensor | None = None
        if weights_of_classes is not None:
            weights_of_images = weights_of_classes[labels] if labels.ndim == 1 else labels @ weights_of_classes
        loss = class_loss(logits32, labels, weights_of_images)
        parts: loop.Losses = {}
        if config.reg > 0:
            weights = [p for p in model.parameters() if p.ndim > 1]
            penalty = config.reg * torch.stack([w.square().sum() for w in weights]).sum()
            parts["reg"] = penalty.detach()
            loss = loss + penalty
        if isinstance(train_loader, HardExampleLoader):
            train_loader.record(F.cross_entropy(upcast(logits.detach()), labels, reduction="none"))
        return {"loss": loss, **parts, "batch_accuracy": batch_accuracy(logits.detach(), labels)}

    return loss_fn


def batch_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over a batch of the probability that the label (N,), or (N, K) of a mixture, is the predicted."""
    predicted = logits.argmax(1)
    is_correct = predicted == labels if labels.ndim == 1 else labels.gather(1, predicted[:, None])
    return is_correct.float().mean()


def balanced_weights(labels: Tensor, num_classes: int = 0) -> Tensor:
    """Return a weight for each class, N / (C * images of the class): the mean weight of the N images is 1."""
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / ((counts > 0).sum() * counts.clamp(min=1))


def compute_metrics(model: nn.Module, batch: tuple[Tensor, Tensor], tta: str = "none") -> dict[str, Tensor]:
    """Return sums over a batch: cross-entropy, correct predictions (also with test-time augmentation), image count."""
    images, labels = batch
    views = [] if tta == "none" else tta_views(images, tta)
    logits = upcast(model(images.clone() if views else images))  # a model may change its input in place
    sums = {
        "loss": F.cross_entropy(logits, labels, reduction="sum"),
        "accuracy": (logits.argmax(1) == labels).sum(),
        "count": torch.tensor(len(labels)),
    }
    if views:
        weighted = [weight * upcast(model(view.clone())) for weight, view in views]
        sums["accuracy_tta"] = (torch.stack(weighted).sum(0).argmax(1) == labels).sum()
    return sums


def build_evaluator(setup: ClassificationSetup, tta: str) -> Callable[[nn.Module, str], dict[str, float]]:
    """Return a function that evaluates a model on a split; each metric's name is preceded by the split."""

    def evaluate(model: nn.Module, split_name: str) -> dict[str, float]:
        is_train = split_name == "train"
        limit = MAX_TRAIN_EVAL_IMAGES if is_train else len(setup.splits[split_name][1])
        metrics_fn = functools.partial(compute_metrics, tta="none" if is_train else tta)
        metrics = loop.evaluate(model, setup.eval_batches(split_name, limit), metrics_fn, setup.ctx)
        metrics = {f"{split_name}_{key}": value for key, value in metrics.items()}
        require_finite(metrics)
        return metrics

    return evaluate


def evaluate_robustness(config: ClassifyConfig, setup: ClassificationSetup, model: nn.Module) -> dict[str, float]:
    """Return the accuracy on validation images under attack, if adversarial training measures it."""
    if config.adversarial is None or not config.evaluates_robustness or "val" not in setup.splits:
        return {}
    images, labels = setup.splits["val"]
    chosen = slice(config.adversarial.eval_images)
    images, labels = select_rows(images, chosen), labels[chosen]
    accuracy = robust_accuracy(model, images, labels, setup.normalize, config.adversarial, setup.eval_batch_size)
    return {ROBUST_METRIC: accuracy}
