"""Classification: train an image classifier on any data set, classify photos with an ImageNet-pretrained model.

The methods import torch, not this module: a configuration is validated without it. Every task does the same.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric
from cvlab.data import datasets
from cvlab.data.resolve import DownloadPolicy
from cvlab.engine.config import TRAIN_METRICS
from cvlab.errors import ConfigError
from cvlab.experiments.base import Evaluable, Experiment, Exportable, PhotoExperiment, State, default_splits
from cvlab.experiments.classification.config import ClassifyConfig, ClassifyPhotosConfig
from cvlab.experiments.classification.profiles import expand_profiles
from cvlab.runs.results import Column, PhotoResult
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from torch import nn

    from cvlab.engine.task import ExportSpec
    from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo

COLUMNS = (Column("top", "prediction", has_lines=True),)


class ClassifyPhotosExperiment(PhotoExperiment[ClassifyPhotosConfig]):
    """Classify photos with an ImageNet-pretrained model: the most likely classes and their probabilities.

    References:
        Russakovsky et al., 2015, "ImageNet Large Scale Visual Recognition Challenge"; Tan and Le, 2019
        (EfficientNet).

    Metrics:
        `num_photos`, `mean_probability` of the predicted class.

    Command:
        cvlab classify photo.jpg
    """

    name = "classify_photos"
    Config = ClassifyPhotosConfig
    columns = COLUMNS
    metrics = (Metric("num_photos"), Metric("mean_probability", "fraction"))

    def run(self, config: ClassifyPhotosConfig, run: RunDir) -> dict[str, float]:
        """Classify all photos."""
        import torch

        from cvlab.data import photos
        from cvlab.experiments.common import photo_batches

        ctx, model = config.build()

        def classify(batch: "list[Photo]", check_interrupt: "CheckInterrupt") -> list[PhotoResult]:
            images = torch.stack([photos.to_tensor(model.transform(photo.image)) for photo in batch])
            with torch.inference_mode():
                probabilities = model.probabilities(images.to(ctx.device))
            values, indices = probabilities.topk(min(config.top, probabilities.shape[1]))
            results = []
            for photo, scores, classes in zip(batch, values.tolist(), indices.tolist(), strict=True):
                predictions = [model.class_score(k, score) for k, score in zip(classes, scores, strict=True)]
                results.append(PhotoResult(str(photo.path), {**predictions[0], "top": predictions}))
            return results

        results = photo_batches.run(config, run, classify, "classify", self.columns)
        mean = statistics.fmean(result.values["score"] for result in results)
        return {"num_photos": len(results), "mean_probability": mean}

    def plan(self, config: ClassifyPhotosConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do."""
        from cvlab.experiments.common import photo_batches

        ctx, model = config.build()
        return photo_batches.plan(config, ctx, model)


def _has_val(config: ClassifyConfig) -> bool:
    return config.has_validation


def _has_test(config: ClassifyConfig) -> bool:
    return config.evaluate_test


def _has_tta(config: ClassifyConfig) -> bool:
    return config.tta != "none"


class ClassifyExperiment(Experiment[ClassifyConfig], Evaluable[ClassifyConfig], Exportable[ClassifyConfig]):
    """Train an image classifier: any model, optimizer, schedule and data set.

    References:
        EECS 498/598 (Johnson, University of Michigan, 2019), assignments 3 and 4.

    Metrics:
        `train_accuracy`, `val_accuracy` (unless `val_fraction` is 0), and `test_accuracy` if `evaluate_test` is
        set.

    Command:
        cvlab train configs/cifar_bn.yaml
    """

    name = "classify"
    Config = ClassifyConfig
    metrics = (
        *TRAIN_METRICS,
        Metric("train_accuracy", "fraction", "higher"),
        Metric("best_train_accuracy", "fraction", "higher", lambda config: not _has_val(config)),
        Metric("best_val_accuracy", "fraction", "higher", _has_val),
        Metric("val_loss", better="lower", when=_has_val),
        Metric("val_accuracy", "fraction", "higher", _has_val),
        Metric("val_accuracy_tta", "fraction", "higher", lambda config: _has_val(config) and _has_tta(config)),
        Metric("test_loss", better="lower", when=_has_test),
        Metric("test_accuracy", "fraction", "higher", _has_test),
        Metric("test_accuracy_tta", "fraction", "higher", lambda config: _has_test(config) and _has_tta(config)),
    )

    def expand(self, raw: dict[str, Any], overrides: Sequence[str], location: Callable[[str], str]) -> Sequence[str]:
        """Apply the profile that is named; return one override for each profile if none is."""
        return expand_profiles(raw, overrides, location)

    def prepare(self, loaded: Loaded, policy: DownloadPolicy) -> ClassifyConfig:
        """Return the configuration to run: its data set resolved, its profile chosen by measuring."""
        from cvlab.experiments.classification import throughput

        config = super().prepare(loaded, policy)
        if not loaded.variants:
            return config
        return throughput.choose_profile(loaded, config.data)

    def run(self, config: ClassifyConfig, run: RunDir) -> dict[str, float]:
        """Train, or resume training; return the metrics."""
        from cvlab.data.digest import DataDigest
        from cvlab.engine import trainer
        from cvlab.engine.task import TrainTask
        from cvlab.experiments.classification.setup import build, build_evaluator, build_loss_fn

        setup = build(config, run.path)
        evaluate = build_evaluator(setup, config.tta)

        def evaluate_train_and_val(model: "nn.Module") -> dict[str, float]:
            train = evaluate(model, "train")
            val = evaluate(model, "val") if "val" in setup.splits else {}
            return {"train_accuracy": train["train_accuracy"], **val}

        task = TrainTask(
            model=setup.model,
            loss_fn=build_loss_fn(config, setup.train_loader),
            get_batch=setup.train_loader.get_batch,
            steps_per_epoch=setup.train_loader.steps_per_epoch,
            items_per_step=config.batch_size,
            evaluate=evaluate_train_and_val,
            extra_state=setup.train_loader.extra_state,
            data_digest=DataDigest().add_tensors(setup.dataset.tensors()).hex(),
            monitor=config.monitor,
            ctx=setup.ctx,
        )
        model, metrics = trainer.train(config, task, run)
        return metrics | (evaluate(model, "test") if config.evaluate_test else {})

    def export_spec(self, config: ClassifyConfig, base: Path, state: State) -> "ExportSpec":
        """Return the model of a checkpoint with its normalization included: it takes images in [0, 1]."""
        import torch

        from cvlab.engine.task import ExportSpec
        from cvlab.experiments.classification.data.images import dataset_size
        from cvlab.experiments.classification.setup import build
        from cvlab.models.pretrained import NormalizedModel
        from cvlab.runs import checkpoint

        setup = build(config, base)
        checkpoint.load_eval_weights(setup.model, state, str(base))
        size = dataset_size(setup.dataset)
        mean, std = setup.train_loader.normalize.mean_and_std()
        metadata = {
            "takes": f"images, float32 (N, {size.channels}, {size.image_px}, {size.image_px}) in [0, 1]",
            "gives": f"logits (N, {size.num_classes})",
            "normalised_inside": {"mean": mean, "std": std},
            "classes": setup.dataset.classes,
        }
        example = torch.rand(1, size.channels, size.image_px, size.image_px)
        return ExportSpec(NormalizedModel(setup.model, mean, std), setup.model, example, ("scores",), metadata)

    def plan(self, config: ClassifyConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do; nothing is written, and only a user's own data set is loaded."""
        from cvlab.engine import device, optimizers
        from cvlab.experiments.classification.data.images import count_steps_per_epoch, dataset_size, split_sizes
        from cvlab.experiments.classification.setup import build_model, load_user_dataset

        ctx = device.select_device(config.device, config.precision, config.threads)
        user_dataset = load_user_dataset(config, base)
        size = dataset_size(user_dataset) if user_dataset else datasets.get(config.data.name).size
        model = build_model(config, base, size)
        optimizers.build_optimizer(config.optimizer.name, model, config.optimizer.builder_arguments())
        num_train, num_val = split_sizes(size.train_images, config.data.val_fraction, config.data.num_train)
        steps_per_epoch = count_steps_per_epoch(num_train, config.batch_size)
        steps = config.duration.num_steps(steps_per_epoch)
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
        from cvlab.experiments.classification.setup import build, build_evaluator
        from cvlab.runs import checkpoint

        setup = build(config, base)
        checkpoint.load_eval_weights(setup.model, state, str(base))
        evaluate = build_evaluator(setup, config.tta)
        splits = splits or default_splits(setup.splits)
        unknown = [name for name in splits if name not in setup.splits]
        if unknown:
            raise ConfigError(f"unknown split {unknown[0]!r}", f"known: {', '.join(setup.splits)}")
        metrics: dict[str, float] = {}
        for name in splits:
            metrics |= evaluate(setup.model, name)
        return metrics
