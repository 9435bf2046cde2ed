"""Saliency maps: which pixels the prediction depends on, by gradient, SmoothGrad, integrated gradients or Grad-CAM.

References:
    Simonyan et al., 2014, "Deep Inside Convolutional Networks", section 3.1; Smilkov et al., 2017; Sundararajan et
    al., 2017; Selvaraju et al., 2017.

Metrics:
    `num_photos`: number of photos.
    `inside`: fraction of the map's sum that its strongest 10 % of pixels have (0.1 for a uniform map).

Command:
    cvlab saliency photo.jpg
"""

import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import photos, rng
from cvlab.engine.device import ComputeContext
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import Photo
from cvlab.experiments.common.photo_config import PhotoConfig
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import saliency
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult
from cvlab.runs.run_dir import RunDir

COLUMNS = (
    Column("predicted", "prediction"),
    Column("label", "explained class"),
    Column("inside", "inside"),
    Column("panel", "panel", is_file=True),
    Column("map", "map", is_file=True),
    Column("overlay", "overlay", is_file=True),
    Column("values", "values", is_file=True),
)


class SaliencyConfig(PhotoConfig):
    """Configuration of saliency maps: the photos, the method, the class to explain."""

    method: Literal["gradient", "smoothgrad", "integrated_gradients", "gradcam"] = Field(
        "gradient", description="how the map is computed"
    )
    target: str | None = Field(None, description="class to explain; null: the predicted class")
    objective: Literal["score", "loss"] = Field(
        "score", description="explain the logit of the class or its cross-entropy loss"
    )
    samples: schema.PositiveInt = Field(
        25, description="smoothgrad: number of noisy copies; integrated_gradients: number of steps"
    )
    noise: schema.PositiveFloat = Field(
        0.15, description="smoothgrad: standard deviation of the noise, as a fraction of the photo's value range"
    )


def compute_maps(config: SaliencyConfig, model: PretrainedClassifier, inputs: Tensor, classes: Tensor) -> Tensor:
    """Return the saliency maps (N, S, S) of model inputs (N, 3, S, S) for classes (N,)."""
    module: nn.Module = model.module
    if config.method == "gradient":
        return saliency.vanilla_gradient(module, inputs, classes, config.objective)
    if config.method == "gradcam":
        layer = saliency.find_last_feature_layer(module, model.transform.size_px)
        return saliency.gradcam(module, inputs, classes, config.objective, layer=layer)
    if config.method == "integrated_gradients":
        values = saliency.integrated_gradients(module, inputs, classes, config.objective, steps=config.samples)
        return values.abs().sum(1)
    std = (inputs.amax((1, 2, 3), keepdim=True) - inputs.amin((1, 2, 3), keepdim=True)) * config.noise

    def noise(k: int) -> Tensor:
        return rng.normal(config.seed, k, inputs[0].shape, "smoothgrad").to(inputs) * std

    return saliency.smoothgrad(module, inputs, classes, config.objective, noise=noise, samples=config.samples)


def strongest_fraction(values: Tensor) -> float:
    """Return the fraction of a map's sum that the 10 % of its pixels with the highest values have."""
    flat = values.flatten().sort(descending=True).values
    return float(flat[: len(flat) // 10].sum() / flat.sum().clamp(min=1e-30))


class SaliencyMaps:
    """Computes and saves the saliency maps of batches of photos; `target` None: of the predicted classes."""

    def __init__(
        self, config: SaliencyConfig, model: PretrainedClassifier, ctx: ComputeContext, target: int | None, run: RunDir
    ) -> None:
        self.config, self.model, self.ctx, self.target, self.run = config, model, ctx, target, run

    def __call__(self, batch: list[Photo], check_interrupt: Callable[[], None]) -> list[PhotoResult]:
        """Return one result for each photo."""
        model, ctx = self.model, self.ctx
        inputs = torch.stack([photos.to_tensor(model.transform(photo.image)) for photo in batch]).to(ctx.device)
        with torch.inference_mode():
            probabilities = model.probabilities(inputs)
        predicted = probabilities.argmax(1)
        classes = predicted if self.target is None else torch.full((len(batch),), self.target, device=ctx.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with ctx.autocast():
            maps = compute_maps(self.config, model, inputs, classes.clone()).float().cpu()
        results = []
        for photo, values, p, index in zip(batch, maps, probabilities, classes.tolist(), strict=True):
            row = {
                **model.class_score(index, float(p[index])),
                "predicted": model.class_score(int(p.argmax()), float(p.max())),
                "inside": strongest_fraction(values),
            }
            results.append(PhotoResult(str(photo.path), row, self._save(photo, values, model.classes[index])))
        return results

    def _save(self, photo: Photo, values: Tensor, class_name: str) -> dict[str, str]:
        """Save a map as an image, as an overlay, in a panel, and as an array; return the paths."""
        transform, config = self.model.transform, self.config
        scaled = images.scaled(values)
        heat = images.heat(scaled)
        overlay = images.overlay(photo.image, scaled, transform.crop_box(*photo.image.size))
        tiles = [
            ("what the net sees", transform(photo.image)),
            (f"{config.method} of {config.objective}: {class_name}", heat),
            ("on the photo", overlay),
        ]
        panel = images.panel(tiles, photo.path.name)
        files = {}
        for key, image in (("map", heat), ("overlay", overlay), ("panel", panel)):
            files[key] = f"images/{photo.label}-{key}.png"
            self.run.write_bytes(files[key], images.png(image))
        array = io.BytesIO()
        np.save(array, values.numpy())
        files["values"] = f"images/{photo.label}-map.npy"
        self.run.write_bytes(files["values"], array.getvalue())
        return files


class SaliencyExperiment(PhotoExperiment[SaliencyConfig]):
    """Saliency maps: which pixels of a photo the prediction depends on."""

    name = "saliency"
    Config = SaliencyConfig
    columns = COLUMNS
    metrics = (Metric("num_photos"), Metric("inside", "fraction", "higher"))

    def run(self, config: SaliencyConfig, run: RunDir) -> dict[str, float]:
        """Compute the saliency maps of all photos."""
        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        run.folder("images")
        saliency_maps = SaliencyMaps(config, model, ctx, target, run)
        results = photo_batches.run(config, run, saliency_maps, "saliency", self.columns)
        inside = statistics.fmean(result.values["inside"] for result in results)
        return {"num_photos": len(results), "inside": inside}

    def plan(self, config: SaliencyConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown class, or a method the model does not allow."""
        ctx, model = config.build()
        if config.target is not None:
            model.class_index(config.target)
        if config.method == "gradcam":
            saliency.find_last_feature_layer(model.module, model.transform.size_px)
        return photo_batches.plan(config, ctx, model)
