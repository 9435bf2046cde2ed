"""k-nearest neighbors on pixels, the baseline of any classifier: k by cross-validation, the test images once.

The methods import torch, not this module: a configuration is validated without it.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import Field, field_validator

from cvlab import registry
from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import datasets
from cvlab.errors import ConfigError
from cvlab.experiments.base import Experiment
from cvlab.experiments.classification.config import PHOTO_DATASETS
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from cvlab.experiments.classification.data.images import ImageDataset
    from cvlab.experiments.classification.evaluation import Predictions

BLOCK = 1000  # images whose distances to all others are computed at a time
NEIGHBORS_IMAGE = "images/neighbors.png"
SHOWN_IMAGES, SHOWN_NEIGHBORS = 10, 7  # of a picture of rows
CheckInterrupt = Callable[[], None]


class NearestNeighborsDataConfig(schema.DataConfig):
    """The data set, and how much of it is used."""

    num_train: schema.PositiveInt | None = Field(
        5000, description="compare with the first N training images; null: all"
    )
    num_test: schema.PositiveInt | None = Field(500, description="classify the first N test images; null: all")

    @field_validator("name", "fallback")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not registry.is_user_file(name):
            datasets.check_kind(name, "images")
            if name in PHOTO_DATASETS:
                raise ValueError(f"{name} has photos of any size; its pixels cannot be compared")
        return name


class NearestNeighborsConfig(schema.RunConfig):
    """Which numbers of neighbors are compared, and on what."""

    data: NearestNeighborsDataConfig
    ks: Annotated[tuple[schema.PositiveInt, ...], MinLen(1)] = Field(
        (1, 3, 5, 8, 10, 12, 15, 20, 50, 100), description="numbers of neighbors, of which cross-validation chooses one"
    )
    folds: Annotated[int, Ge(2), Le(100)] = Field(
        5, description="number of parts of the training images, each of which is classified by the others"
    )
    shuffle: bool = Field(
        True, description="divide the training images at random, by the seed; false: in their order, as the course does"
    )
    precision: Literal["float32", "float64"] = Field("float32", description="of the distances")

    @field_validator("ks")
    @classmethod
    def _ascending(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(ks)))


class NearestNeighborsExperiment(Experiment[NearestNeighborsConfig]):
    """Classify images by the labels of the most similar training images (k-NN), k chosen by cross-validation.

    References:
        CS231n (Stanford) and EECS 498 (Johnson, University of Michigan), assignment 1.

    Metrics:
        `k`, the number of neighbors with the highest `val_accuracy`, which is the mean over the folds;
        `test_accuracy` with that k, and of its votes the metrics that classifiers have. The curve is the accuracy of
        each k, which stands in place of the step.

    Command:
        cvlab train configs/knn.yaml
    """

    name = "knn"
    Config = NearestNeighborsConfig
    saves_checkpoints = False
    metrics = (
        Metric("k"),
        Metric("val_accuracy", "fraction", "higher"),
        Metric("test_accuracy", "fraction", "higher"),
        Metric("test_loss", better="lower"),
        Metric("test_top5_accuracy", "fraction", "higher"),
        Metric("test_macro_f1", "fraction", "higher"),
        Metric("test_ece", "fraction", "lower"),
        *(Metric(f"test_{name}/*", "fraction", "higher") for name in ("precision", "recall", "f1")),
        Metric("images_per_second", "1/s", "higher"),
    )

    def run(self, config: NearestNeighborsConfig, run: RunDir) -> dict[str, float]:
        """Choose k on the training images, classify the test images, and write pictures of both."""
        from cvlab.engine import device
        from cvlab.experiments.classification import report

        ctx = device.select_device(config.device, config.precision, config.threads)
        dataset = _load(config, run.path)
        x = dataset.train_images[:].flatten(1).to(ctx.device, ctx.dtype)
        queries = dataset.test_images[:].flatten(1).to(ctx.device, ctx.dtype)
        run.truncate_metrics(0)  # of a run that was interrupted, which begins again
        with StopRequest() as stop:

            def check_interrupt() -> None:
                stop.raise_if_set(0, run.path.name, "image")

            labels = dataset.train_labels.to(ctx.device)
            accuracies = cross_validate(config, x, labels, len(dataset.classes), check_interrupt)
            for k, of_folds in accuracies.items():
                spread = statistics.stdev(of_folds)
                run.append({"step": k, "val_accuracy": statistics.fmean(of_folds), "val_accuracy_sd": spread})
            k = max(accuracies, key=lambda k: (statistics.fmean(accuracies[k]), -k))
            run.log(f"k = {k} has the highest accuracy on the {config.folds} folds of the training images")
            start = time.perf_counter()
            neighbors = find_neighbors(queries, x, k, check_interrupt).cpu()
            seconds = time.perf_counter() - start
        predictions = predict(neighbors, dataset)
        scores = report.scores(predictions, "test")
        run.extra_summary["class_metrics"] = scores.class_metrics
        report.write(run, predictions, scores.metrics, dataset.test_images, "test")
        run.folder("images")
        run.write_bytes(NEIGHBORS_IMAGE, draw_neighbors(dataset, predictions, neighbors))
        return {
            "k": k,
            "val_accuracy": statistics.fmean(accuracies[k]),
            **scores.metrics,
            "images_per_second": len(predictions.labels) / seconds,
        }

    def plan(self, config: NearestNeighborsConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do; only a user's own data set is loaded."""
        from cvlab.engine import device
        from cvlab.experiments.classification import setup
        from cvlab.experiments.classification.data.images import dataset_size

        ctx = device.select_device(config.device, config.precision, config.threads)
        dataset = setup.load_user_dataset(config.data.name, base)
        size = datasets.get(config.data.name).size if dataset is None else dataset_size(dataset)
        num_train, num_test = _require_enough(config, size.train_images, size.test_images)
        return {
            "parameters": num_train * size.image_px**2 * size.channels,  # all pixels are remembered
            "train_images": num_train,
            "test_images": num_test,
            "folds": config.folds,
            "ks": ", ".join(map(str, config.ks)),
            **ctx.as_dict(),
        }


def _require_enough(config: NearestNeighborsConfig, available_train: int, available_test: int) -> tuple[int, int]:
    """Return the numbers of training and test images.

    Raises:
        ConfigError: The data set has fewer than the configuration asks for, or a fold has fewer than k others.
    """
    counts = []
    for key, available in (("num_train", available_train), ("num_test", available_test)):
        count = getattr(config.data, key)
        if count is not None and config.data.fallback_for is not None:
            count = min(count, available)  # it was chosen for the data set that the fallback replaces
        count = available if count is None else count
        if not 0 < count <= available:
            raise ConfigError(f"data.{key} {count}: {config.data.name} has {available} images", f"at most {available}")
        counts.append(count)
    smallest = counts[0] - -(-counts[0] // config.folds)
    if config.ks[-1] > smallest:
        raise ConfigError(
            f"ks: {config.ks[-1]} neighbors of {smallest} images, which {config.folds} folds of {counts[0]} leave",
            "give smaller numbers, or raise data.num_train",
        )
    return counts[0], counts[1]


def _load(config: NearestNeighborsConfig, base: Path) -> "ImageDataset":
    """Load the first images of a data set that fit the configuration."""
    import dataclasses

    from cvlab.experiments.classification import setup
    from cvlab.experiments.classification.data.images import ImageDatasetSource
    from cvlab.storage.cache import data_root

    dataset = setup.load_user_dataset(config.data.name, base)
    if dataset is None:
        dataset = datasets.get_of_kind(config.data.name, ImageDatasetSource).load(data_root())
    num_train, num_test = _require_enough(config, len(dataset.train_labels), len(dataset.test_labels))
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:num_train],
        train_labels=dataset.train_labels[:num_train],
        test_images=dataset.test_images[:num_test],
        test_labels=dataset.test_labels[:num_test],
    )


def find_neighbors(queries: "Tensor", x: "Tensor", k: int, check_interrupt: CheckInterrupt) -> "Tensor":
    """Return the indices of the k nearest of vectors (M, D) for each query (N, D): int64 (N, k), the nearest first."""
    import torch

    from cvlab.ops import nearest_neighbors

    rows = []
    for block in queries.split(BLOCK):
        check_interrupt()
        rows.append(nearest_neighbors.nearest(nearest_neighbors.distances_no_loops(block, x), k))
    return torch.cat(rows)


def cross_validate(
    config: NearestNeighborsConfig, x: "Tensor", labels: "Tensor", num_classes: int, check_interrupt: CheckInterrupt
) -> dict[int, list[float]]:
    """Return the accuracy of each k on each fold, which is classified by all others.

    Args:
        config: The configuration.
        x: The training images as vectors (N, D).
        labels: Their labels, int64 (N,).
        num_classes: Number of classes.
        check_interrupt: Called often; may raise to stop.
    """
    import torch

    from cvlab.console import Progress
    from cvlab.data import rng
    from cvlab.ops import nearest_neighbors

    indices = torch.arange(len(x), device=x.device)
    order = rng.permutation(config.seed, 0, len(x), x.device) if config.shuffle else indices
    folds = order.tensor_split(config.folds)
    accuracies: dict[int, list[float]] = {k: [] for k in config.ks}
    with Progress("folds", config.folds, 0) as progress:
        for index, fold in enumerate(folds):
            others = torch.cat([other for number, other in enumerate(folds) if number != index])
            neighbors = labels[others][find_neighbors(x[fold], x[others], config.ks[-1], check_interrupt)]
            for k in config.ks:
                votes = nearest_neighbors.count_votes(neighbors[:, :k], num_classes)
                is_correct = nearest_neighbors.majority(votes) == labels[fold]
                accuracies[k].append(is_correct.double().mean().item())
            progress.update(index + 1, f"k={config.ks[0]}: {accuracies[config.ks[0]][-1]:.3f}")
    return accuracies


def predict(neighbors: "Tensor", dataset: "ImageDataset") -> "Predictions":
    """Return what the votes of k neighbors, int64 (N, k), predict for the test images.

    Probabilities are (votes + 1) / (k + C), by Laplace's rule; of classes with equal votes the first is predicted.
    """
    import torch

    from cvlab.experiments.classification.evaluation import Predictions
    from cvlab.ops import nearest_neighbors

    num_classes = len(dataset.classes)
    votes = nearest_neighbors.count_votes(dataset.train_labels[neighbors], num_classes)
    logits = ((votes + 1) / (neighbors.shape[1] + num_classes)).log()
    logits -= 1e-5 * torch.arange(num_classes)  # equal votes: the first class
    files = tuple(map(str, range(len(votes))))
    return Predictions(logits.float(), dataset.test_labels, dataset.classes, files)


def draw_neighbors(dataset: "ImageDataset", predictions: "Predictions", neighbors: "Tensor") -> bytes:
    """Draw the first test images, each in a row with its nearest training images, as PNG."""
    from cvlab.experiments.classification.data.images import to_image
    from cvlab.reports import images

    rows = []
    for row, indices in enumerate(neighbors[:SHOWN_IMAGES, :SHOWN_NEIGHBORS].tolist()):
        label = dataset.classes[int(dataset.test_labels[row])]
        predicted = dataset.classes[int(predictions.predicted[row])]
        tiles = [(f"is {label}, predicted {predicted}", to_image(dataset.test_images, row))]
        tiles += [(dataset.classes[int(dataset.train_labels[k])], to_image(dataset.train_images, k)) for k in indices]
        rows.append(tiles)
    return images.png(images.neighbor_sheet(rows, "test images and their nearest training images"))
