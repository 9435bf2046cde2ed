"""Classification: train an image classifier on any data set, classify photos with an ImageNet-pretrained model.

The methods import torch, not this module: a configuration is validated without it. Every task does the same.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric, require_finite
from cvlab.data.resolve import DownloadPolicy
from cvlab.engine.config import TRAIN_METRICS
from cvlab.experiments.base import (
    ClassifiesPhotos,
    Evaluable,
    EvaluatesOtherData,
    Exportable,
    HasLabeledImages,
    HasPhotoModule,
    HasSummary,
    HasTrainTask,
    MeasuresRobustness,
    PhotoExperiment,
    ShowsData,
    State,
    default_splits,
)
from cvlab.experiments.classification.config import ClassifyConfig, ClassifyPhotosConfig
from cvlab.experiments.classification.profiles import expand_profiles
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.records import is_run
from cvlab.runs.results import Column, PhotoResult
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from torch import nn

    from cvlab.engine.task import ExportSpec, TrainTask
    from cvlab.experiments.classification.report import Scores
    from cvlab.experiments.classification.setup import ClassificationSetup
    from cvlab.experiments.common.data_overview import DataOverview
    from cvlab.experiments.common.labeled_classifier import LabeledClassifier, LabeledImages
    from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
    from cvlab.models.photo_module import PhotoModule
    from cvlab.models.pretrained import PretrainedClassifier
    from cvlab.models.summary import SummarySpec

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
        from cvlab.experiments.common import photo_batches

        _, model = config.build()

        def classify(batch: "list[Photo]", check_interrupt: "CheckInterrupt") -> list[PhotoResult]:
            rows = model.top_classes([photo.image for photo in batch], config.top)
            return [PhotoResult(str(photo.path), row) for photo, row in zip(batch, rows, strict=True)]

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


def _has_robust_val(config: ClassifyConfig) -> bool:
    return config.has_validation and config.evaluates_robustness


def _has_test(config: ClassifyConfig) -> bool:
    return config.evaluate_test


def _has_tta(config: ClassifyConfig) -> bool:
    return config.tta != "none"


def _split_metrics(split: str, when: Callable[[ClassifyConfig], bool]) -> tuple[Metric, ...]:
    """Return the metrics of a split beside loss and accuracy; those with a class at the end are of that class."""
    return (
        Metric(f"{split}_top5_accuracy", "fraction", "higher", when),
        Metric(f"{split}_macro_f1", "fraction", "higher", when),
        Metric(f"{split}_ece", "fraction", "lower", when),
        *(Metric(f"{split}_{name}/*", "fraction", "higher", when) for name in ("precision", "recall", "f1")),
    )


class ClassifyExperiment(
    ShowsData[ClassifyConfig],
    Evaluable[ClassifyConfig],
    EvaluatesOtherData[ClassifyConfig],
    Exportable[ClassifyConfig],
    ClassifiesPhotos[ClassifyConfig],
    HasPhotoModule[ClassifyConfig],
    HasSummary[ClassifyConfig],
    HasTrainTask[ClassifyConfig],
    MeasuresRobustness[ClassifyConfig],
    HasLabeledImages[ClassifyConfig],
):
    """Train an image classifier: any model, optimizer, schedule and data set.

    References:
        EECS 498/598 (Johnson, University of Michigan, 2019), assignments 3 and 4.

    Metrics:
        `train_accuracy`, `val_accuracy` (unless `val_fraction` is 0), `val_robust_accuracy` under attack with
        `adversarial`, and `test_accuracy` if `evaluate_test` is set.

    Command:
        cvlab train configs/cifar_bn.yaml
    """

    name = "classify"
    Config = ClassifyConfig
    metrics = (
        *TRAIN_METRICS,
        Metric("reg", better="lower", when=lambda config: config.reg > 0),
        Metric("train_accuracy", "fraction", "higher"),
        Metric("best_train_accuracy", "fraction", "higher", lambda config: not _has_val(config)),
        Metric("best_val_accuracy", "fraction", "higher", lambda config: config.monitor == "val_accuracy"),
        Metric("best_val_robust_accuracy", "fraction", "higher", _has_robust_val),
        Metric("val_robust_accuracy", "fraction", "higher", _has_robust_val),
        Metric("val_loss", better="lower", when=_has_val),
        Metric("val_accuracy", "fraction", "higher", _has_val),
        *_split_metrics("val", _has_val),
        Metric("val_accuracy_tta", "fraction", "higher", lambda config: _has_val(config) and _has_tta(config)),
        Metric("test_loss", better="lower", when=_has_test),
        Metric("test_accuracy", "fraction", "higher", _has_test),
        *_split_metrics("test", _has_test),
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
        from cvlab.engine import trainer
        from cvlab.experiments.classification import photo_model
        from cvlab.experiments.classification.data import manifest
        from cvlab.experiments.classification.setup import build, build_evaluator, build_task, evaluate_robustness

        with StopRequest() as stop:
            setup = build(config, run.path, check_interrupt=lambda: stop.raise_if_set(0, run.path.name, "image"))
        manifest.record(run, setup.dataset)
        photo_model.write(run, setup)
        evaluate = build_evaluator(setup, config.tta)

        def evaluate_train_and_val(model: "nn.Module") -> dict[str, float]:
            train = evaluate(model, "train")
            val = evaluate(model, "val") if "val" in setup.splits else {}
            return {"train_accuracy": train["train_accuracy"], **val, **evaluate_robustness(config, setup, model)}

        task = build_task(config, setup, evaluate_train_and_val)
        model, metrics = trainer.train(config, task, run)
        splits = ["val", *(["test"] if config.evaluate_test else [])]
        scores = self._report(config, setup, model, [name for name in splits if name in setup.splits], run)
        run.extra_summary["class_metrics"] = scores.class_metrics
        self._check_labels(setup, run)
        return metrics | scores.metrics

    def _report(
        self,
        config: ClassifyConfig,
        setup: "ClassificationSetup",
        model: "nn.Module",
        splits: Sequence[str],
        run: RunDir,
    ) -> "Scores":
        """Return the metrics of splits, in float32; write predictions and pictures, unless the run is a trial."""
        from cvlab.experiments.classification import report
        from cvlab.experiments.classification.evaluation import predict

        total = report.Scores({}, {})
        for name in splits:
            images, labels = setup.splits[name]
            dataset = setup.dataset
            files = dataset.files.get(name, ())[: len(labels)]
            tta = "none" if name == "train" else config.tta
            predictions = predict(
                model, images, labels, setup.normalize, setup.ctx, dataset.classes, files, tta, setup.eval_batch_size
            )
            scores = report.scores(predictions, name)
            require_finite(scores.metrics)
            total = total | scores
            if run.writable and not is_run(run.path.parent.parent):
                report.write(run, predictions, scores.metrics, images, name)
        return total

    def _check_labels(self, setup: "ClassificationSetup", run: RunDir) -> None:
        """Write which training labels are probably wrong, if the features of the images are there anyway."""
        from cvlab.experiments.classification import label_check, report

        labels = setup.splits["train"][1].cpu()
        store = setup.stores.get("train")
        if store is None or len(labels) > label_check.MAX_IMAGES or not run.writable or is_run(run.path.parent.parent):
            return
        features = store.rows("features")[:: store.views.count].float()
        suspicious = label_check.suspicious_labels(features, labels, len(setup.dataset.classes))
        files = setup.dataset.files.get("train") or tuple(map(str, range(len(labels))))
        report.write_labels_to_check(run, suspicious, files, labels.tolist(), setup.dataset)
        if suspicious:
            noun = "training label" if len(suspicious) == 1 else "training labels"
            run.log(f"{len(suspicious)} {noun} may be wrong, judging by the other images: {report.LABELS_TO_CHECK}")

    def data_overview(self, config: ClassifyConfig, base: Path, num_samples: int) -> "DataOverview":
        """Return what the data set consists of, with some training images before and after augmentation."""
        from cvlab.experiments.classification.data import overview
        from cvlab.experiments.classification.setup import load_dataset

        return overview.build(config, load_dataset(config, base), num_samples)

    def export_spec(self, config: ClassifyConfig, base: Path, state: State) -> "ExportSpec":
        """Return the model of a checkpoint with its normalization included: it takes images in [0, 1]."""
        import torch

        from cvlab.engine.task import ExportSpec

        model = self.photo_classifier(config, base, state, "cpu")
        mean, std = model.mean_and_std()
        channels, size = len(mean), model.transform.size_px
        metadata = {
            "input": f"images, float32 (N, {channels}, {size}, {size}) in [0, 1]",
            "output": f"logits (N, {len(model.classes)})",
            "normalization": {"mean": mean, "std": std},
            "preprocessing": asdict(model.transform),
            "classes": model.classes,
        }
        example = torch.rand(1, channels, size, size)
        return ExportSpec(model.module, model.module.model, example, ("scores",), metadata)

    def photo_classifier(self, config: ClassifyConfig, base: Path, state: State, device: str) -> "PretrainedClassifier":
        """Return the model of a checkpoint, with the size and normalization of its images and its classes."""
        from cvlab.experiments.classification import photo_model

        return photo_model.load(config, base, state, device)

    def photo_module(self, config: ClassifyConfig, base: Path, weights: str, device: str) -> "PhotoModule":
        """Return the model of a run for images in memory."""
        from cvlab.models.photo_module import PhotoClassifier
        from cvlab.runs import checkpoint

        state = checkpoint.load_of_run(base, weights)
        return PhotoClassifier(self.photo_classifier(config, base, state, device)).eval()

    def train_task(self, config: ClassifyConfig, base: Path, check_interrupt: Callable[[], None]) -> "TrainTask":
        """Return the untrained model, its loss and its batches."""
        from cvlab.experiments.classification.setup import build, build_task

        return build_task(config, build(config, base, check_interrupt=check_interrupt), lambda _: {})

    def synthetic_task(self, config: ClassifyConfig, base: Path) -> "TrainTask":
        """Return the untrained model, its loss and batches of noise."""
        from cvlab.experiments.classification import setup, throughput

        return setup.build_task(config, throughput.build_on_synthetic_images(config, base), lambda _: {})

    def summary_spec(self, config: ClassifyConfig, base: Path) -> "SummarySpec":
        """Return the model and a black image of the size of the data set."""
        import torch

        from cvlab.experiments.classification.setup import build_model, expected_size
        from cvlab.models.summary import SummarySpec

        size, _ = expected_size(config, base)
        model = build_model(config, base, size).float()
        return SummarySpec({"": model}, model, torch.zeros(1, size.channels, size.image_px, size.image_px))

    def plan(self, config: ClassifyConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do; nothing is written, and only a user's own data set is loaded."""
        from cvlab.engine import parameters
        from cvlab.experiments.classification.data.images import count_steps_per_epoch
        from cvlab.experiments.classification.setup import build_model, expected_size

        ctx = config.compute_context()
        size, counts = expected_size(config, base)
        config.require_validation(counts["val"] > 0)
        model = build_model(config, base, size)
        parameters.build_optimizer(config, model)
        steps_per_epoch = count_steps_per_epoch(counts["train"], config.batch_size)
        steps = config.duration.num_steps(steps_per_epoch)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_images": counts["train"],
            "val_images": counts["val"],
            "steps_per_epoch": steps_per_epoch,
            "steps": steps or f"as many as fit in {config.duration.seconds:g} s",
            **ctx.as_dict(),
        }

    def evaluate(self, config: ClassifyConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint on splits; on validation and test if none is given."""
        setup = self._restore(config, base, state, splits)
        splits = splits or default_splits(setup.splits)
        scores = self._report(config, setup, setup.model, splits, RunDir(base))
        return scores.metrics | scores.class_metrics

    def _restore(
        self,
        config: ClassifyConfig,
        base: Path,
        state: State,
        splits: Sequence[str],
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> "ClassificationSetup":
        """Return the data, which must have these splits, and the model with the weights of a checkpoint."""
        from cvlab.experiments.classification.setup import build, require_splits
        from cvlab.runs import checkpoint

        setup = build(config, base, check_interrupt=check_interrupt, is_restored=True)
        checkpoint.load_eval_weights(setup.model, state, str(base))
        require_splits(splits, setup.splits)
        return setup

    def labeled_classifier(
        self,
        config: ClassifyConfig,
        base: Path,
        state: State,
        split: str,
        device: str,
        check_interrupt: Callable[[], None],
    ) -> "LabeledClassifier":
        """Return the classifier of a checkpoint with a split of its data."""
        from cvlab.experiments.classification.setup import labeled_classifier

        on_device = config.model_copy(update={"device": device})
        return labeled_classifier(self._restore(on_device, base, state, [split], check_interrupt), split)

    def labeled_images(
        self, config: ClassifyConfig, base: Path, split: str | None, check_interrupt: Callable[[], None]
    ) -> "LabeledImages":
        """Return the images of a split of the data."""
        from cvlab.experiments.classification.setup import labeled_images

        return labeled_images(config, base, split, check_interrupt)

    def evaluate_on(
        self, config: ClassifyConfig, base: Path, state: State, data: str, splits: Sequence[str]
    ) -> dict[str, float]:
        """Evaluate the weights of a checkpoint on another data set with the same names of classes."""
        from cvlab.experiments.classification import other_data

        ctx = config.compute_context()
        model = self.photo_classifier(config, base, state, str(ctx.device))
        return other_data.evaluate(model, data, splits, ctx, RunDir(base))
