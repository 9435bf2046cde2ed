"""All pictures of a network in a run directory, with a table of its layers."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cvlab import registry
from cvlab.config import loading
from cvlab.console import Progress
from cvlab.data import photo_paths
from cvlab.engine.device import ComputeContext, seed_everything
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.base import Experiment, HasLabeledImages, HasTrainTask
from cvlab.experiments.common import embedding
from cvlab.experiments.common.labeled_classifier import LabeledImages
from cvlab.experiments.common.photo_batches import resolve_images, unique_labels
from cvlab.experiments.interpretability import feature_space, image_sets, landscape, layer_pictures
from cvlab.experiments.interpretability.config import SPLITS, LookConfig
from cvlab.experiments.interpretability.feature_space import EmbeddedSet
from cvlab.experiments.interpretability.image_sets import ImageSet
from cvlab.models import activations
from cvlab.models.activations import ActivationRecorder
from cvlab.reports import images, tables
from cvlab.runs import checkpoint, records
from cvlab.runs.find import config_path
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir
from cvlab.storage.file_names import file_stem

MAX_PHOTOS = 8  # whose feature maps are drawn
COLUMNS = ("layer", "type", "output", "mean", "std", "dead", "std of weights", "std of gradients")


def plan(config: LookConfig) -> dict[str, Any]:
    """Return what a run would do."""
    ctx, model = config.build()
    activations.check_layers(layer_pictures.inner_network(model), config.layers)
    values: dict[str, Any] = {"model": Path(config.model).name if config.is_run else config.model}
    if config.images:
        values["photos"] = len(resolve_images(config.images)[1])
    if config.on is not None:
        values["on"] = config.on
    if config.on is not None and config.on not in SPLITS:
        values["images"] = min(config.num_images, len(image_sets.list_folder(Path(config.on))[0]))
    if config.landscape:
        values["landscape"] = f"{config.resolution} x {config.resolution} points"
    return {**values, "parameters": sum(p.numel() for p in model.module.parameters()), **ctx.as_dict()}


@dataclass(frozen=True)
class ShownImage:
    """An image whose feature maps are drawn: name, what its files are called, thumbnail, input (1, C, S, S)."""

    name: str
    label: str
    picture: Image.Image
    inputs: Tensor


class NetworkReport:
    """Computes and writes everything that a configuration asks for."""

    def __init__(self, config: LookConfig, run: RunDir) -> None:
        self.config, self.run = config, run
        self.ctx: ComputeContext
        self.ctx, self.model = config.build()
        self.network = layer_pictures.inner_network(self.model)
        activations.check_layers(self.network, config.layers)
        self.results: list[PhotoResult] = []
        self.metrics: dict[str, float] = {}
        self.unread: set[Path] = set()
        self.num_done = 0  # images

    def write(self) -> dict[str, float]:
        """Write all pictures and tables; return the metrics."""
        config, run = self.config, self.run
        run.folder("images")
        with StopRequest() as stop:

            def check_interrupt() -> None:
                stop.raise_if_set(self.num_done, run.path.name, "image")

            photo_set = self._named_photos()
            split = self._split(check_interrupt)
            image_set = self._image_set(split) or photo_set
            assert image_set is not None
            shown = self._shown(photo_set, MAX_PHOTOS) if photo_set is not None else self._shown(image_set, 1)
            self._draw_filters()
            self._draw_histograms("weights", dict(self.network.named_parameters()))
            gradients = self._gradients(check_interrupt)
            if gradients:
                self._draw_histograms("gradients", gradients)
            self._write_weights(gradients)
            recorder, space = self._record(image_set, image_set is not photo_set, check_interrupt)
            self._write_layers(recorder, gradients, image_set.title)
            self._draw_maps(list(config.layers) or list(recorder.map_layers.values()), shown)
            if space is not None:
                self._draw_space(space, shown if photo_set is not None else [], check_interrupt)
            if config.landscape:
                assert split is not None
                self._draw_landscape(split, check_interrupt)
        return self.metrics

    def _add(self, name: str, content: bytes, shows: str) -> None:
        """Write a picture and list it among the results."""
        self.run.write_bytes(name, content)
        self.results.append(PhotoResult(name, {"shows": shows}))

    def _named_photos(self) -> ImageSet | None:
        """Return the photos that are named, or a bundled one for a pretrained model without other images."""
        names = self.config.images or (() if self.config.is_run or self.config.on else (photo_paths.SAMPLE,))
        if not names:
            return None
        paths = resolve_images(names)[0]
        title = paths[0].name if len(paths) == 1 else f"{len(paths)} photos"
        return image_sets.of_photos(paths, [], (), title, self.model, self._warn)

    def _warn(self, path: Path, error: DataError) -> None:
        if path not in self.unread:
            self.run.log(f"warning: {error}")
        self.unread.add(path)

    def _split(self, check_interrupt: Callable[[], None]) -> LabeledImages | None:
        """Return the split of the run's data that is needed, None if none is."""
        config = self.config
        is_needed = config.on in SPLITS or (config.on is None and (config.landscape or not config.images))
        if not config.is_run or not is_needed:
            return None
        trained, experiment = self._trained
        assert isinstance(experiment, HasLabeledImages)
        return experiment.labeled_images(trained, Path(config.model), config.on, check_interrupt)

    @cached_property
    def _trained(self) -> tuple[Any, Experiment[Any]]:
        """The configuration and the experiment of the run."""
        config = loading.load(str(config_path(Path(self.config.model))), []).config
        return config, registry.get_experiment(config.experiment)

    def _image_set(self, split: LabeledImages | None) -> ImageSet | None:
        """Return the images of `on`, of a run without photos the default split; None: the named photos."""
        config = self.config
        if config.on is not None and config.on not in SPLITS:
            folder = Path(config.on)
            paths, labels, classes = image_sets.list_folder(folder)
            chosen = image_sets.evenly_spaced(len(paths), config.num_images)
            labels = [labels[k] for k in chosen] if labels else []
            return image_sets.of_photos(
                [paths[k] for k in chosen], labels, classes, folder.name, self.model, self._warn
            )
        if split is not None and (config.on is not None or not config.images):
            return image_sets.of_split(split, config.num_images)
        return None

    def _shown(self, image_set: ImageSet, count: int) -> list[ShownImage]:
        """Return the first images of a set that can be read. DataError if none can."""
        shown: list[ShownImage] = []
        for batch in image_set.batches(1):
            picture, inputs = batch.pictures[0], batch.inputs.to(self.ctx.device)
            shown.append(ShownImage(batch.names[0], "", picture, inputs))
            if len(shown) == count:
                break
        if not shown:
            raise DataError(f"{image_set.title}: cannot be read", photo_paths.FORMAT_HINT)
        if image_set.count > count > 1:
            self.run.log(f"feature maps are drawn of the first {count} of {image_set.count} photos")
        labels = unique_labels([Path(image.name) for image in shown])
        return [replace(image, label=label) for image, label in zip(shown, labels, strict=True)]

    def _draw_filters(self) -> None:
        size, channels = self.model.transform.size_px, self.model.module.scale.shape[1]
        inputs = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(self.ctx.device)
        layer = layer_pictures.find_first_layer(self.network, self.model.module, inputs)
        picture, shows = (None, "the network has no weights") if layer is None else layer_pictures.draw_filters(layer)
        if picture is None:
            self.run.log(shows)
        else:
            self._add("images/filters.png", images.png(layer_pictures.titled(picture, shows)), shows)

    def _draw_histograms(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Draw histograms of the weights, or of their gradients, that have more than one axis; of all if none has."""
        matrices = {name: values for name, values in tensors.items() if values.ndim > 1} or tensors
        if matrices:
            title = f"{kind} of {self.model.name}"
            picture = layer_pictures.draw_histograms(matrices, title)
            self._add(f"images/{kind}.png", images.png(picture), f"{kind} of each layer")

    def _gradients(self, check_interrupt: Callable[[], None]) -> dict[str, Tensor]:
        """Return the gradients of the run's loss on one training batch by name; empty if they cannot be computed."""
        if not self.config.is_run:
            return {}
        trained, experiment = self._trained
        if not isinstance(experiment, HasTrainTask):
            return {}
        path = Path(self.config.model)
        precision = "float64" if trained.precision == "float64" else "float32"
        trained = trained.model_copy(update={"device": str(self.ctx.device), "precision": precision})
        try:
            task = experiment.train_task(trained, path, check_interrupt)
        except DataError as error:
            self.run.log(f"no gradients: {error}")
            return {}
        checkpoint.load_eval_weights(task.model, checkpoint.load_of_run(path, "last"), path)
        seed_everything(self.config.seed)  # of dropout
        task.model.train()
        task.loss_fn(task.model, task.get_batch(0))["loss"].backward()
        named = task.model.named_parameters()
        return {name: weight.grad.detach().cpu() for name, weight in named if weight.grad is not None}

    def _write_weights(self, gradients: dict[str, Tensor]) -> None:
        """Write weights.csv: statistics of every parameter, and the standard deviation of its gradient."""
        rows: list[list[object]] = [["weight", "shape", "mean", "std", "min", "max", "gradient std"]]
        for name, weight in self.network.named_parameters():
            about = layer_pictures.weight_statistics(weight)
            gradient = layer_pictures.weight_statistics(gradients[name]).std if name in gradients else None
            shape = " x ".join(map(str, weight.shape))
            rows.append([name, shape, about.mean, about.std, about.low, about.high, gradient])
        self._write_csv("weights.csv", rows)

    def _write_csv(self, name: str, rows: Iterable[Sequence[object]]) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(map(tables.csv_cell, row) for row in rows)
        self.run.write_text(name, buffer.getvalue())

    def _record(
        self, image_set: ImageSet, with_features: bool, check_interrupt: Callable[[], None]
    ) -> tuple[ActivationRecorder, EmbeddedSet | None]:
        """Record the activations of all images; with `with_features` also return their place in the feature space."""
        recorder = ActivationRecorder(self.network)
        embedder = self._embedder if with_features else None
        features: list[Tensor] = []
        pictures: list[Image.Image] = []
        names: list[str] = []
        labels: list[Tensor] = []
        with Progress("images", image_set.count, 0) as progress:
            for batch in image_set.batches(self.config.batch_size):
                check_interrupt()
                inputs = batch.inputs.to(self.ctx.device).contiguous(memory_format=torch.channels_last)
                with torch.inference_mode(), recorder.recording(len(inputs)):
                    self.model.module(inputs)
                if embedder is not None:
                    features.append(feature_space.embed(embedder, inputs))
                    pictures += batch.pictures
                    names += batch.names
                    labels += [] if batch.labels is None else [batch.labels]
                self.num_done += len(inputs)
                if progress.due():
                    progress.update(self.num_done, "")
        self.metrics["images"] = self.num_done
        if not features:
            return recorder, None
        all_labels = torch.cat(labels) if labels else None
        space = EmbeddedSet(image_set.title, torch.cat(features), pictures, names, all_labels, image_set.classes)
        return recorder, space

    @cached_property
    def _embedder(self) -> embedding.Embedder | None:
        """Computes the features of the last layer; None if the network has none."""
        try:
            return embedding.build(self.model)
        except ConfigError as error:
            self.run.log(f"no feature space: {error}")
            return None

    def _write_layers(self, recorder: ActivationRecorder, gradients: dict[str, Tensor], title: str) -> None:
        """Write the table of the layers into summary.json and layers.csv, and what is dead."""
        weights = dict(self.network.named_parameters())
        rows: list[list[Any]] = []
        for layer in recorder.layers.values():
            key = f"{layer.name}.weight"
            spread = [
                layer_pictures.weight_statistics(tensors[key]).std if key in tensors else None
                for tensors in (weights, gradients)
            ]
            shape = " x ".join(map(str, layer.shape))
            rows.append([layer.name, layer.layer, shape, layer.mean, layer.std, layer.dead_fraction, *spread])
        columns = [index for index in range(len(COLUMNS)) if any(row[index] is not None for row in rows)]
        number = "1 image" if self.num_done == 1 else f"{self.num_done:,} images"
        self.run.extra_summary["tables"] = [
            {
                "title": f"layers, over {number}: {title}",
                "columns": [COLUMNS[index] for index in columns],
                "rows": [[row[index] for index in columns] for row in rows],
            }
        ]
        self._write_csv("layers.csv", [COLUMNS, *rows])
        relus = [layer for layer in recorder.layers.values() if layer.is_relu]
        if not relus:
            return
        num_dead, total = (sum(getattr(layer, key) for layer in relus) for key in ("num_dead", "num_channels"))
        self.metrics["dead_fraction"] = num_dead / total
        worst = max(relus, key=lambda layer: layer.num_dead / layer.num_channels)
        where = f"; {worst.num_dead} of {worst.num_channels} in {worst.name}" if num_dead else ""
        self.run.extra_summary["headline"] = (
            f"{num_dead} of {total} channels of ReLUs are positive for none of {number}{where}"
        )

    def _draw_maps(self, layers: Sequence[str], shown: Sequence[ShownImage]) -> None:
        """Draw the channels of some layers for each image that is shown."""
        if not layers:
            self.run.log("no feature maps: no layer has positions; name layers to draw others")
        for image in shown:
            with torch.inference_mode(), activations.recorded_outputs(self.network, layers) as outputs:
                self.model.module(image.inputs.contiguous(memory_format=torch.channels_last))
            activations.require_outputs(outputs, layers)
            for name in layers:
                picture, about = layer_pictures.draw_channels(outputs[name], self.config.channels)
                shows = f"{name}, {image.name}: {about}"
                file = f"images/{image.label}-{file_stem(name)}.png"
                self._add(file, images.png(layer_pictures.titled(picture, shows)), shows)

    def _draw_space(
        self, space: EmbeddedSet, photos: Sequence[ShownImage], check_interrupt: Callable[[], None]
    ) -> None:
        """Draw nearest neighbors, of photos if there are any, and the map; write the positions."""
        config, num = self.config, len(space.pictures)
        if num < feature_space.MIN_IMAGES:
            self.run.log(f"no neighbors and no t-SNE of {num} images: at least {feature_space.MIN_IMAGES} are needed")
            return
        assert self._embedder is not None
        embed = partial(feature_space.embed, self._embedder)
        queries = [(photo.name, photo.picture, embed(photo.inputs)[0]) for photo in photos]
        sheet = feature_space.draw_neighbors(space, min(config.neighbors, num - 1), queries)
        self._add("images/neighbors.png", images.png(sheet), "nearest images in the feature space of the last layer")
        if space.labels is not None:
            self.metrics["same_class_fraction"] = feature_space.same_class_fraction(space)
        if not config.tsne_steps:
            return
        with Progress("t-SNE", config.tsne_steps, 0) as progress:

            def on_step(step: int) -> None:
                check_interrupt()
                if progress.due():
                    progress.update(step, "")

            drawn, positions, divergence = feature_space.draw_map(space, config.perplexity, config.tsne_steps, on_step)
        self.metrics["kl_divergence"] = divergence
        self._add("images/tsne.png", images.png(drawn), f"t-SNE of {num} images of {space.title}")
        self._write_csv("tsne.csv", feature_space.to_csv_rows(space, positions))

    def _draw_landscape(self, split: LabeledImages, check_interrupt: Callable[[], None]) -> None:
        """Measure and draw the loss landscape."""
        config, data = self.config, f"{split.data} {split.split}"
        losses = landscape.measure(config, self.model, split, self.run, check_interrupt)
        distances, half = landscape.axis(config), config.resolution // 2
        loss = self.metrics["loss"] = float(losses[half, half])
        ends = torch.stack([losses[half, 0], losses[half, -1], losses[0, half], losses[-1, half]])
        self.metrics["loss_at_radius"] = float(ends.mean())
        total, num = len(split.labels), min(config.num_images, len(split.labels))
        shows = f"loss of {num:,} images of {data} around the weights, where it is {loss:.4g}"
        evaluated = records.read_summary(Path(config.model)).get("metrics", {}).get(f"{split.split}_loss")
        if evaluated is not None and num == total:
            shows += f"; {split.split}_loss of the run: {evaluated:.4g}"
        picture = landscape.draw(losses, distances, f"{self.model.name}\n{num:,} images of {data}")
        self._add("images/landscape.png", picture, shows)
        rows = [["direction 2", *(f"{a:.4g}" for a in distances)]]
        rows += [[f"{b:.4g}", *map(repr, row)] for b, row in zip(distances, losses.tolist(), strict=True)]
        self._write_csv("landscape.csv", rows)
