"""Saliency maps of a pretrained classifier by each method of the configuration."""

from typing import Any

import torch
from torch import Tensor, nn

from cvlab.data import rng
from cvlab.experiments.interpretability import attention, captum_methods
from cvlab.experiments.interpretability.config import CAPTUM_METHODS, SaliencyConfig, SaliencyMethod
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import saliency

METHOD_TITLES: dict[SaliencyMethod, str] = {
    "gradient": "gradient",
    "smoothgrad": "SmoothGrad",
    "integrated_gradients": "integrated gradients",
    "gradcam": "Grad-CAM",
    "layercam": "LayerCAM",
    "scorecam": "Score-CAM",
    "occlusion": "occlusion",
    "guided_backprop": "guided backpropagation",
    "shapley": "Shapley values",
    "deeplift": "DeepLift",
    "lime": "LIME",
    "rollout": "attention rollout",
}
CAM_METHODS = {"gradcam": saliency.gradcam, "layercam": saliency.layercam, "scorecam": saliency.scorecam}
FORWARD_BATCH = 16  # images in a forward pass of methods with many of them


def check_method(method: SaliencyMethod, model: PretrainedClassifier) -> None:
    """Raise ConfigError if a model does not allow a method."""
    if method in CAM_METHODS:
        saliency.find_last_feature_layer(model.module, model.transform.size_px, method)
    if method == "guided_backprop":
        captum_methods.require_relus(model.module, model.transform.size_px)
    if method == "deeplift":
        captum_methods.require_completeness(model.module, model.transform.size_px, fill_color(model))
    if method == "rollout":
        size_px = model.transform.size_px
        attention.rollout(model, torch.full((1, 3, size_px, size_px), 0.5, device=model.module.scale.device))


def compute_maps(
    config: SaliencyConfig, method: SaliencyMethod, model: PretrainedClassifier, inputs: Tensor, classes: Tensor
) -> Tensor:
    """Return the saliency maps (N, S, S), not negative, of model inputs (N, 3, S, S) for classes (N,)."""
    module: nn.Module = model.module
    objective = config.objective
    if method == "gradient":
        return saliency.vanilla_gradient(module, inputs, classes, objective)
    if method in CAM_METHODS:
        layer = saliency.find_last_feature_layer(module, model.transform.size_px, method)
        return CAM_METHODS[method](module, inputs, classes, objective, layer=layer)
    if method == "integrated_gradients":
        values = saliency.integrated_gradients(module, inputs, classes, objective, steps=config.samples)
        return values.abs().sum(1)
    if method == "guided_backprop":
        return captum_methods.guided_backprop(module, inputs, classes, objective)
    if method == "deeplift":
        return captum_methods.deeplift(module, inputs, classes, baseline=fill_color(model)).abs().sum(1)
    if method == "rollout":
        return attention.rollout(model, inputs)
    if method in CAPTUM_METHODS:
        return _perturbation_maps(config, method, model, inputs, classes)
    std = (inputs.amax((1, 2, 3), keepdim=True) - inputs.amin((1, 2, 3), keepdim=True)) * config.noise

    def noise(k: int) -> Tensor:
        return rng.normal(config.seed, k, inputs[0].shape, "smoothgrad").to(inputs) * std

    return saliency.smoothgrad(module, inputs, classes, objective, noise=noise, samples=config.samples)


def _perturbation_maps(
    config: SaliencyConfig, method: SaliencyMethod, model: PretrainedClassifier, inputs: Tensor, classes: Tensor
) -> Tensor:
    """Return the evidence for the classes (N,), (N, S, S): the positive values of occlusion, Shapley values or LIME."""
    fill, size_px = fill_color(model), inputs.shape[-1]
    with torch.no_grad():
        if method == "occlusion":
            window_px = max(1, round(config.window * size_px))
            values = captum_methods.occlusion(
                model.module,
                inputs,
                classes,
                config.objective,
                fill=fill,
                window_px=window_px,
                batch_size=max(1, FORWARD_BATCH // len(inputs)),
            )
        else:
            grid = min(size_px, max(1, round(1 / config.window)))
            options: dict[str, Any] = {"fill": fill, "grid": grid, "seed": config.seed}
            arguments = (model.module, inputs, classes, config.objective)
            if method == "shapley":
                values = captum_methods.shapley(*arguments, **options, samples=config.samples)
            else:
                num_samples = config.samples * grid**2  # as many forward passes as Shapley values take
                values = captum_methods.lime(*arguments, **options, samples=num_samples, batch_size=FORWARD_BATCH)
    return values.clamp(min=0)


def fill_color(model: PretrainedClassifier) -> Tensor:
    """Return the color (3,) of pixels that are taken away: the mean color, which the normalization makes 0."""
    return torch.tensor(model.mean_and_std()[0]).to(model.module.scale).clamp(0, 1)


def strongest_fraction(values: Tensor) -> float:
    """Return the fraction of a map's sum that the 10 % of its pixels with the highest values have."""
    flat = values.flatten().sort(descending=True).values
    return float(flat[: len(flat) // 10].sum() / flat.sum().clamp(min=1e-30))
