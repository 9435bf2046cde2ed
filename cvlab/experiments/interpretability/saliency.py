"""Saliency maps of photos: compute them, save them as images and arrays."""

import io

import numpy as np
import torch
from torch import Tensor, nn

from cvlab.data import photos, rng
from cvlab.engine.device import ComputeContext
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.experiments.interpretability.config import SaliencyConfig
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import saliency
from cvlab.reports import images
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir

METHOD_TITLES = {
    "gradient": "gradient",
    "smoothgrad": "SmoothGrad",
    "integrated_gradients": "integrated gradients",
    "gradcam": "Grad-CAM",
}


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

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
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
        caption = f"{METHOD_TITLES[config.method]} of the {config.objective}: {class_name}"
        box = transform.crop_box(*photo.image.size)
        tiles = [("the model's input", transform(photo.image))]
        tiles += images.saliency_tiles(caption, photo.image, scaled, box)
        panel = images.panel(tiles, f"saliency: {photo.path.name}", has_color_bar=True)
        files = {}
        for key, image in (("map", heat), ("overlay", overlay), ("panel", panel)):
            files[key] = f"images/{photo.label}-{key}.png"
            self.run.write_bytes(files[key], images.png(image))
        array = io.BytesIO()
        np.save(array, values.numpy())
        files["values"] = f"images/{photo.label}-map.npy"
        self.run.write_bytes(files["values"], array.getvalue())
        return files
