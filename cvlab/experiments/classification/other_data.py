"""Evaluate a trained classifier on a data set that is not its own: `cvlab eval RUN --data folder:PATH`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cvlab import console, registry
from cvlab.data import datasets
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError
from cvlab.experiments.classification import report
from cvlab.experiments.classification.config import FOLDER
from cvlab.experiments.classification.data import folder
from cvlab.experiments.classification.data.images import ImageDataset, ImageDatasetSource, Normalization
from cvlab.experiments.classification.evaluation import predict
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root
from cvlab.storage.file_names import file_stem

WHOLE = "test"  # what a data set without splits is called in the names of metrics


def evaluate(
    model: PretrainedClassifier, data: str, splits: Sequence[str], ctx: ComputeContext, run: RunDir
) -> dict[str, float]:
    """Return the metrics of a classifier on another data set; write predictions and pictures into its run.

    Args:
        model: The classifier.
        data: `folder:PATH`, or the name of a data set.
        splits: Splits to evaluate; empty: those that are not for training, or all photos of a folder without splits.
        ctx: Where to compute.
        run: The run directory of the classifier.

    Returns:
        The metrics, each name preceded by its split.

    Raises:
        ConfigError: There is no such data set or split, or it has classes that the classifier does not know.
        DataError: The data set is missing or damaged.
    """
    dataset, has_splits = _load(model, data)
    parts = dataset.splits()
    names = splits or [name for name in parts if name != "train" or not has_splits]
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise ConfigError(f"--data {data}: no split {unknown[0]!r}", f"known: {', '.join(parts)}")
    plain = Normalization(torch.full((1, 1, 1, 1), 1 / 255), torch.zeros(1, 1, 1, 1))  # the model has its own inside
    metrics: dict[str, float] = {}
    for name in names:
        images, labels = parts[name]
        shown = name if has_splits else WHOLE
        files = dataset.files.get(name, ())
        predictions = predict(model.module, images, labels, plain, ctx, model.classes, files)
        scores = report.scores(predictions, shown)
        metrics |= scores.metrics | scores.class_metrics
        report.write(run, predictions, scores.metrics, images, f"{file_stem(dataset.name)}-{shown}")
    return metrics


def _load(model: PretrainedClassifier, data: str) -> tuple[ImageDataset, bool]:
    """Return a data set with the labels and images that a classifier has, and whether it has splits."""
    kind, colon, path = data.partition(":")
    if kind == FOLDER and not path:
        raise ConfigError(f"--data {data}: which folder?", "give --data folder:PATH")
    if colon and kind == FOLDER:
        listing = folder.scan(Path(path).expanduser(), folder.SplitConfig(val_fraction=0.0), min_classes=1)
        _require_known(model, listing.classes, data)
        dataset = folder.load(replace(listing, classes=model.classes), model.transform)
        return dataset, {photo.split for photo in listing.photos} != {"train"}
    source = datasets.get_of_kind(data, ImageDatasetSource)
    if isinstance(source, folder.PhotoSource):
        listing = source.list_photos(data_root(), None, folder.SplitConfig())
        _require_known(model, listing.classes, data)
        return folder.load(replace(listing, classes=model.classes), model.transform), True
    dataset = source.load(data_root())
    _require_known(model, dataset.classes, data)
    index = torch.tensor([model.classes.index(name) for name in dataset.classes])
    dataset = replace(
        dataset,
        classes=model.classes,
        train_labels=index[dataset.train_labels],
        test_labels=index[dataset.test_labels],
    )
    if model.transform != dataset.photo_transform():
        dataset = dataset.transformed(model.transform)
    return dataset, True


def _require_known(model: PretrainedClassifier, classes: Sequence[str], data: str) -> None:
    unknown = [name for name in classes if name not in model.classes]
    if unknown:
        close = registry.closest_match(unknown[0], model.classes)
        hint = f"did you mean {close!r}?" if close else f"known: {console.printable(', '.join(model.classes[:12]))}"
        raise ConfigError(f"--data {data}: {model.name} knows no class {unknown[0]!r}", hint)
