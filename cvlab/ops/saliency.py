"""Saliency maps: which pixels of an image a classifier's output depends on.

A classifier is a callable from images (N, 3, H, W) in [0, 1] to logits (N, C). Objectives are the logit of a class or
its cross-entropy.

References:
    Simonyan et al., 2014, "Deep inside convolutional networks", section 3.1 (`vanilla_gradient`).
    Smilkov et al., 2017, "SmoothGrad", section 3.1 (`smoothgrad`).
    Sundararajan et al., 2017, "Axiomatic attribution for deep networks", section 3 (`integrated_gradients`).
    Selvaraju et al., 2017, "Grad-CAM", section 3 (`gradcam`).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.errors import ConfigError

Classifier = Callable[[Tensor], Tensor]


def class_score(logits: Tensor, classes: Tensor) -> Tensor:
    """Return each image's logit (N,) of its class, from logits (N, C) and int64 classes (N,)."""
    return logits.gather(1, classes[:, None])[:, 0]


def class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return each image's cross-entropy (N,), from logits (N, C) and int64 classes (N,)."""
    return F.cross_entropy(logits, classes, reduction="none")


OBJECTIVES = {"score": class_score, "loss": class_loss}


def input_gradient(model: Classifier, images: Tensor, classes: Tensor, objective: str = "score") -> Tensor:
    """Return the gradient of the objective with respect to the images; one backward pass for all of them.

    Args:
        model: from images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: one of `OBJECTIVES`.

    Returns:
        gradient (N, 3, H, W), signed.
    """
    x = images.detach().requires_grad_(True)
    return torch.autograd.grad(OBJECTIVES[objective](model(x), classes).sum(), x)[0]


def vanilla_gradient(model: Classifier, images: Tensor, classes: Tensor, objective: str = "score") -> Tensor:
    """Return the largest absolute gradient over the channels.

    Args:
        model: from images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: one of `OBJECTIVES`.

    Returns:
        saliency (N, H, W), not negative.
    """
    return input_gradient(model, images, classes, objective).abs().amax(1)


def smoothgrad(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    objective: str = "score",
    *,
    noise: Callable[[int], Tensor],
    samples: int,
) -> Tensor:
    """Return the mean gradient over noisy copies of the images, reduced as in `vanilla_gradient`.

    Args:
        model: from images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: one of `OBJECTIVES`.
        noise: `noise(k)` is what is added to the images in sample k.
        samples: number of noisy copies.

    Returns:
        saliency (N, H, W), not negative.
    """
    total = torch.zeros_like(images)
    for k in range(samples):
        total += input_gradient(model, images + noise(k), classes, objective)
    return (total / samples).abs().amax(1)


def integrated_gradients(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    objective: str = "score",
    *,
    steps: int,
    baseline: Tensor | float = 0.0,
) -> Tensor:
    """Return how much each input value contributes to the change of the objective from a baseline.

    The path integral is a Gauss-Legendre quadrature. The attributions sum to objective(image) - objective(baseline),
    up to its error.

    Args:
        model: from images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: one of `OBJECTIVES`.
        steps: number of quadrature points.
        baseline: an image that stands for nothing, broadcast to `images`.

    Returns:
        attributions (N, 3, H, W), signed.
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(images)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        on_path = baseline + float(point) * (images - baseline)
        total += float(weight) * input_gradient(model, on_path, classes, objective)
    return total * (images - baseline)


def gradcam(model: nn.Module, images: Tensor, classes: Tensor, objective: str = "score", *, layer: nn.Module) -> Tensor:
    """Return ReLU(sum_k a_k A_k) of a layer's feature maps A, resized to the images.

    a_k is the spatial mean of d objective / d A_k; for the loss, of its negative, so that the map shows what speaks
    for the class in both cases.

    Args:
        model: from images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: one of `OBJECTIVES`.
        layer: a module of the model whose output is (N, K, h, w).

    Returns:
        saliency (N, H, W), not negative.
    """
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        x = images.detach().requires_grad_(True)
        value = OBJECTIVES[objective](model(x), classes).sum()
    finally:
        hook.remove()
    activations = outputs[0]
    (gradient,) = torch.autograd.grad(value, activations)
    gradient = -gradient if objective == "loss" else gradient
    cam = (gradient.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True).relu()  # (N, 1, h, w)
    resized = F.interpolate(cam, size=images.shape[2:], mode="bilinear", align_corners=False)
    return resized[:, 0].detach()


def find_last_feature_layer(model: nn.Module, size_px: int) -> nn.Module:
    """Return the last module of a model whose output is a feature map (N, C, h, w) with h * w > 1.

    Args:
        model: from images (N, 3, S, S) to logits (N, C).
        size_px: S.

    Returns:
        A module without children.

    Raises:
        ConfigError: the model has no feature maps, as a transformer.
    """
    feature_layers: list[nn.Module] = []

    def record(module: nn.Module, _args: object, output: object) -> None:
        if (
            isinstance(output, Tensor)
            and output.ndim == 4
            and output.shape[2] * output.shape[3] > 1
            and output.shape[1] > 3
        ):
            feature_layers.append(module)

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(record) for module in leaves]
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model(torch.zeros(1, 3, size_px, size_px, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    if not feature_layers:
        raise ConfigError("method=gradcam: this model has no feature maps", "choose another method")
    return feature_layers[-1]
