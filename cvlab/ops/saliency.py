"""Where a net looks: four maps of the pixels that a class depends on.

Each takes a net from photos (N, 3, H, W) in [0, 1] to scores (N, C), classes (N,), and gives a map (N, H, W), float.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.errors import ConfigError

Classifier = Callable[[Tensor], Tensor]


def class_score(scores: Tensor, classes: Tensor) -> Tensor:
    """Return each photo's score of its class, before the softmax: (N,)."""
    return scores.gather(1, classes[:, None])[:, 0]


def class_loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Return each photo's cross-entropy: (N,)."""
    return F.cross_entropy(scores, classes, reduction="none")


OBJECTIVES = {"score": class_score, "loss": class_loss}


def input_gradient(net: Classifier, images: Tensor, classes: Tensor, of: str = "score") -> Tensor:
    """Return d f / d x with its sign, (N, 3, H, W), f the class's score or its loss; one backward pass for all."""
    x = images.detach().requires_grad_(True)
    return torch.autograd.grad(OBJECTIVES[of](net(x), classes).sum(), x)[0]


def vanilla_gradient(net: Classifier, images: Tensor, classes: Tensor, of: str = "score") -> Tensor:
    """Return the largest |d f / d x| over the channels. Paper: Simonyan et al., 2014, section 3.1."""
    return input_gradient(net, images, classes, of).abs().amax(1)


def smoothgrad(
    net: Classifier, images: Tensor, classes: Tensor, of: str = "score", *, noise: Callable[[int], Tensor], samples: int
) -> Tensor:
    """Return the gradient's mean over noisy copies, then as `vanilla`. Paper: Smilkov et al., 2017, section 3.1.

    `noise(k)` is what is added to the photos in sample k.
    """
    total = torch.zeros_like(images)
    for k in range(samples):
        total += input_gradient(net, images + noise(k), classes, of)
    return (total / samples).abs().amax(1)


def integrated_gradients(
    net: Classifier, images: Tensor, classes: Tensor, of: str = "score", *, steps: int, baseline: Tensor | float = 0.0
) -> Tensor:
    """Return what each value (N, 3, H, W) adds to f on the way from a baseline. Paper: Sundararajan et al., 2017, 3.

    The integral is a sum at Gauss-Legendre points. The values sum to f(photo) - f(baseline), up to its error.
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(images)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        total += float(weight) * input_gradient(net, baseline + float(point) * (images - baseline), classes, of)
    return total * (images - baseline)


def gradcam(net: nn.Module, images: Tensor, classes: Tensor, of: str = "score", *, layer: nn.Module) -> Tensor:
    """Return ReLU(sum_k a_k A_k) of a layer's feature maps A, resized to the photos. Paper: Selvaraju et al., 2017, 3.

    a_k is the mean of d f / d A_k over the places; with the loss, of its negative, so that the map shows what speaks
    for the class in both cases.
    """
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _args, out: kept.append(out))
    try:
        x = images.detach().requires_grad_(True)
        value = OBJECTIVES[of](net(x), classes).sum()
    finally:
        hook.remove()
    (slope,) = torch.autograd.grad(value, kept[0])
    slope = -slope if of == "loss" else slope
    maps = (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu()  # (N, 1, h, w)
    sized = F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
    return sized[:, 0].detach()


def find_last_feature_layer(net: nn.Module, size_px: int) -> nn.Module:
    """Return the last part of a net whose output still has places: (N, C, h, w) with h * w > 1.

    ConfigError where no part has, as in a transformer.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, _args: object, out: object) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] * out.shape[3] > 1 and out.shape[1] > 3:
            found.append(module)

    leaves = [module for module in net.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        device = next(net.parameters()).device
        with torch.no_grad():
            net(torch.zeros(1, 3, size_px, size_px, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ConfigError("method=gradcam: this model has no feature maps", "choose another method")
    return found[-1]
