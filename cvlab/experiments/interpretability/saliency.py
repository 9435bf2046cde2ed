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
from cvlab.experiments.base import Experiment
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import Photo, PhotoConfig
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import saliency
from cvlab.reports import images
from cvlab.runs.records import Row
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
    of: Literal["score", "loss"] = Field(
        "score", description="explain the logit of the class or its cross-entropy loss"
    )
    samples: schema.PositiveInt = Field(
        25, description="smoothgrad: number of noisy copies; integrated_gradients: number of steps"
    )
    noise: schema.PositiveFloat = Field(
        0.15, description="smoothgrad: standard deviation of the noise, as a fraction of the photo's value range"
    )


def maps(config: SaliencyConfig, model: PretrainedClassifier, images: Tensor, classes: Tensor) -> Tensor:
    """Return the maps (N, S, S) of photos (N, 3, S, S) by the method of a configuration."""
    net: nn.Module = model.module
    if config.method == "gradient":
        return saliency.vanilla_gradient(net, images, classes, config.of)
    if config.method == "gradcam":
        layer = saliency.find_last_feature_layer(net, model.transform.size_px)
        return saliency.gradcam(net, images, classes, config.of, layer=layer)
    if config.method == "integrated_gradients":
        values = saliency.integrated_gradients(net, images, classes, config.of, steps=config.samples)
        return values.abs().sum(1)
    spread = (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)) * config.noise

    def noise(k: int) -> Tensor:
        return rng.normal(config.seed, k, images[0].shape, "smoothgrad").to(images) * spread

    return saliency.smoothgrad(net, images, classes, config.of, noise=noise, samples=config.samples)


def _values(model: PretrainedClassifier, values: Tensor, probabilities: Tensor, index: int) -> Row:
    flat = values.flatten().sort(descending=True).values
    inside = flat[: len(flat) // 10].sum() / flat.sum().clamp(min=1e-30)
    return {
        **model.class_score(index, float(probabilities[index])),
        "predicted": model.class_score(int(probabilities.argmax()), float(probabilities.max())),
        "inside": float(inside),
    }


def _write(
    out: RunDir, config: SaliencyConfig, model: PretrainedClassifier, photo: Photo, values: Tensor, name: str
) -> dict[str, str]:
    shown = images.scaled(values)
    heat = images.heat(shown)
    over = images.overlay(photo.image, shown, model.transform.crop_box(*photo.image.size))
    view = model.transform(photo.image)
    tiles = [("what the net sees", view), (f"{config.method} of {config.of}: {name}", heat), ("on the photo", over)]
    raw = io.BytesIO()
    np.save(raw, values.numpy())
    files = {key: f"images/{photo.label}-{key}.png" for key in ("map", "overlay", "panel")}
    for key, image in (("map", heat), ("overlay", over), ("panel", images.panel(tiles, photo.path.name))):
        out.write_bytes(files[key], images.png(image))
    out.write_bytes(f"images/{photo.label}-map.npy", raw.getvalue())
    return {**files, "values": f"images/{photo.label}-map.npy"}


class SaliencyExperiment(Experiment[SaliencyConfig]):
    """Saliency maps: which pixels of a photo the prediction depends on."""

    name = "saliency"
    Config = SaliencyConfig
    metrics = (Metric("num_photos"), Metric("inside", "fraction", "higher"))

    def run(self, config: SaliencyConfig, run: RunDir) -> dict[str, float]:
        """Explain all photos."""
        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        run.folder("images")

        def work(batch: list[Photo], check_interrupt: Callable[[], None]) -> list[PhotoResult]:
            views = torch.stack([photos.to_tensor(model.transform(photo.image)) for photo in batch]).to(ctx.device)
            with torch.inference_mode():
                probabilities = model.probabilities(views)
            classes = (
                probabilities.argmax(1) if target is None else torch.full((len(batch),), target, device=ctx.device)
            )
            images = views.contiguous(memory_format=torch.channels_last)
            with ctx.autocast():
                found = maps(config, model, images, classes.clone()).float().cpu()
            results = []
            for photo, values, p, k in zip(batch, found, probabilities, classes.tolist(), strict=True):
                files = _write(run, config, model, photo, values, f"{model.classes[k]}")
                results.append(PhotoResult(str(photo.path), _values(model, values, p, k), files))
            return results

        results = photo_batches.run(config, run, work, "saliency", COLUMNS)
        inside = statistics.fmean(result.values["inside"] for result in results)
        return {"num_photos": len(results), "inside": inside}

    def plan(self, config: SaliencyConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do. ConfigError where there is no such class, or no map of this kind."""
        ctx, model = config.build()
        if config.target is not None:
            model.class_index(config.target)
        if config.method == "gradcam":
            saliency.find_last_feature_layer(model.module, model.transform.size_px)
        return photo_batches.plan(config, ctx, model)
