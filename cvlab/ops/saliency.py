"""Saliency maps: which pixels of an image a classifier's output depends on.

A classifier is a callable from images (N, 3, H, W) in [0, 1] to logits (N, C). Objectives are the logit of a class or
its cross-entropy.

References:
    Simonyan et al., 2014, "Deep inside convolutional networks", section 3.1 (`vanilla_gradient`).
    Smilkov et al., 2017, "SmoothGrad", section 3.1 (`smoothgrad`).
    Sundararajan et al., 2017, "Axiomatic attribution for deep networks", section 3 (`integrated_gradients`).
    Selvaraju et al., 2017, "Grad-CAM", section 3 (`gradcam`).
    Jiang et al., 2021, "LayerCAM", section III-B (`layercam`).
    Wang et al., 2020, "Score-CAM", section 3.2 and algorithm 1 (`scorecam`).
    Abnar and Zuidema, 2020, "Quantifying attention flow in transformers", section 3 (`attention_rollout`).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.errors import ConfigError

Classifier = Callable[[Tensor], Tensor]
MAX_PREFIX_TOKENS = 5  # class and register tokens before those of the patches
OTHER_METHOD = "choose another method"


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
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `OBJECTIVES`.

    Returns:
        gradient (N, 3, H, W), signed.
    """
    x = images.detach().requires_grad_(True)
    return torch.autograd.grad(OBJECTIVES[objective](model(x), classes).sum(), x)[0]


def vanilla_gradient(model: Classifier, images: Tensor, classes: Tensor, objective: str = "score") -> Tensor:
    """Return the largest absolute gradient over the channels.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `OBJECTIVES`.

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
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `OBJECTIVES`.
        noise: `noise(k)` is what is added to the images in sample k.
        samples: Number of noisy copies.

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
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `OBJECTIVES`.
        steps: Number of quadrature points.
        baseline: An image that stands for nothing, broadcast to `images`.

    Returns:
        attributions (N, 3, H, W), signed.
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(images)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        on_path = baseline + float(point) * (images - baseline)
        total += float(weight) * input_gradient(model, on_path, classes, objective)
    return total * (images - baseline)


@dataclass(frozen=True)
class FeatureLayer:
    """The output of a module as feature maps.

    Attributes:
        module: The module.
        axes: `NCHW`, `NHWC`, or `tokens`: (N, P + h * h, C), P tokens without a position, then a square grid by row.
        call: Which of the module's outputs, for modules that a forward pass calls several times.
    """

    module: nn.Module
    axes: str = "NCHW"
    call: int = 0

    def to_maps(self, output: Tensor) -> Tensor:
        """Return the feature maps (N, C, h, w) in an output of the module, or in its gradient."""
        if self.axes == "NHWC":
            return output.permute(0, 3, 1, 2)
        if self.axes == "tokens":
            side = math.isqrt(output.shape[1])
            return output[:, -(side**2) :].transpose(1, 2).reshape(len(output), -1, side, side)
        return output


def gradcam(
    model: nn.Module, images: Tensor, classes: Tensor, objective: str = "score", *, layer: FeatureLayer
) -> Tensor:
    """Return ReLU(sum_k a_k A_k) of a layer's feature maps A, resized to the images.

    a_k is the spatial mean of d objective / d A_k; for the loss, of its negative, so that the map shows what speaks
    for the class in both cases.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `OBJECTIVES`.
        layer: Whose feature maps.

    Returns:
        saliency (N, H, W), not negative.
    """
    maps, gradient = _maps_and_gradient(model, images, classes, objective, layer)
    return _resized_cam(gradient.mean((2, 3), keepdim=True) * maps, images)


def layercam(
    model: nn.Module, images: Tensor, classes: Tensor, objective: str = "score", *, layer: FeatureLayer
) -> Tensor:
    """Return ReLU(sum_k ReLU(g_k) A_k) of a layer's feature maps A, resized to the images.

    g_k = d objective / d A_k weights each position by its gradient, where Grad-CAM weights each channel by its mean.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `OBJECTIVES`; of the loss, the negative is differentiated.
        layer: Whose feature maps.

    Returns:
        saliency (N, H, W), not negative.
    """
    maps, gradient = _maps_and_gradient(model, images, classes, objective, layer)
    return _resized_cam(gradient.relu() * maps, images)


@torch.no_grad()
def scorecam(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    objective: str = "score",
    *,
    layer: FeatureLayer,
    batch_size: int = 32,
) -> Tensor:
    """Return ReLU(sum_k a_k A_k) of a layer's feature maps A, resized to the images; no gradient is computed.

    Each map, resized and scaled to [0, 1], masks the image; a is the softmax over the channels of the objectives of the
    masked images (of the loss, of its negative). A constant map masks nothing and has weight 0.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `OBJECTIVES`.
        layer: Whose feature maps.
        batch_size: Number of masked images in a forward pass.

    Returns:
        saliency (N, H, W), not negative.
    """
    outputs, _ = _record_layer(model, images, layer)
    cams = []
    for image, image_class, maps in zip(images, classes, layer.to_maps(outputs), strict=True):
        maps = maps[maps.amax((1, 2)) > maps.amin((1, 2))]  # (K, h, w)
        scores = []
        for chunk in maps.split(batch_size):
            masks = F.interpolate(chunk[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)
            low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
            masked = image * (masks - low) / (high - low).clamp(min=torch.finfo(masks.dtype).tiny)
            masked = masked.contiguous(memory_format=torch.channels_last)
            values = OBJECTIVES[objective](model(masked), image_class.expand(len(masked)))
            scores.append(-values if objective == "loss" else values)
        weights = torch.cat(scores).softmax(0) if scores else maps.new_zeros(0)
        cams.append(weights[:, None, None] * maps)
    return torch.cat([_resized_cam(cam[None], images) for cam in cams])


def _record_layer(model: nn.Module, images: Tensor, layer: FeatureLayer) -> tuple[Tensor, Tensor]:
    """Return the layer's output and the logits (N, C)."""
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # what follows may work in place

    hook = layer.module.register_forward_hook(record)
    try:
        logits = model(images)
    finally:
        hook.remove()
    return outputs[layer.call], logits


def _maps_and_gradient(
    model: nn.Module, images: Tensor, classes: Tensor, objective: str, layer: FeatureLayer
) -> tuple[Tensor, Tensor]:
    """Return feature maps (N, K, h, w) and the gradient of the score, or of the negative loss, of the same shape."""
    output, logits = _record_layer(model, images.detach().requires_grad_(True), layer)
    (gradient,) = torch.autograd.grad(OBJECTIVES[objective](logits, classes).sum(), output)
    maps, gradient = layer.to_maps(output), layer.to_maps(gradient)
    return maps, -gradient if objective == "loss" else gradient


def _resized_cam(weighted_maps: Tensor, images: Tensor) -> Tensor:
    """Return the positive part (N, H, W) of the sum of weighted feature maps (N, K, h, w), resized to the images."""
    cam = weighted_maps.sum(1, keepdim=True).relu()  # (N, 1, h, w)
    return F.interpolate(cam, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0].detach()


def attention_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Return how much of each token reaches each token through all layers of attention and their residual connections.

    Args:
        attentions: Softmax weights (N, heads, T, T) of each layer, from the first one on; rows sum to 1.

    Returns:
        rollout (N, T, T); row i is what token i of the last layer consists of, and sums to 1.
    """
    identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    rollout = identity
    for attention in attentions:
        rollout = (0.5 * attention.mean(1) + 0.5 * identity) @ rollout
    return rollout


@dataclass(frozen=True)
class _Call:
    """One call of a module in a forward pass, and the node of its output in the autograd graph."""

    module: nn.Module
    call: int
    output: Tensor
    node: Any
    output_number: int  # of the node


def find_last_feature_layer(model: nn.Module, size_px: int, method: str = "gradcam") -> FeatureLayer:
    """Return the layer before the pooling: the last one through whose feature maps everything passes.

    A branch of a concatenation or a residual connection is no such layer, as the logits depend on the image past it;
    nor are maps whose positions no longer matter, such as the patch tokens behind the last attention of a transformer
    that classifies its class token.

    Args:
        model: Maps images (N, 3, S, S) to logits (N, C).
        size_px: S.
        method: What needs the layer; for the message of an error.

    Returns:
        The layer, with its axes.

    Raises:
        ConfigError: the model has no feature maps, or has them in an order that is not known.
    """
    calls, image, logits = _record_calls(model, size_px)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    num_maps = sum(_is_spatial(call.output) for call in calls)
    num_behind = 0
    for call in reversed(calls):
        if not _is_spatial(call.output) or not _is_bottleneck(call, logits.grad_fn, image):
            num_behind += _is_spatial(call.output)
            continue
        axes = map_axes(call.output)
        layer = FeatureLayer(call.module, axes or "NCHW", call.call)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), call.output, retain_graph=True)
        if axes is None and gradient.any():
            raise ConfigError(
                f"method={method}: axes of the feature maps {tuple(call.output.shape)} unknown", OTHER_METHOD
            )
        if axes is not None and layer.to_maps(gradient).any():
            if 2 * num_behind > num_maps:
                break
            return layer
        num_behind += 1
    raise ConfigError(f"method={method}: this model has no feature maps before its pooling", OTHER_METHOD)


def _record_calls(model: nn.Module, size_px: int) -> tuple[list[_Call], Tensor, Tensor]:
    """Return the calls of all modules with a differentiable output, in order, with the image and the logits."""
    calls: list[_Call] = []
    counts: Counter[nn.Module] = Counter()

    def record(module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            calls.append(_Call(module, counts[module], output, output.grad_fn, output.output_nr))
        counts[module] += 1

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    parameter = next(model.parameters())
    image = torch.rand(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        image.requires_grad_(True)
        with torch.enable_grad():
            logits: Tensor = model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, image, logits


def _is_spatial(output: Tensor) -> bool:
    """Whether an output may have positions: it has more than two axes of more than one element."""
    return output.ndim > 2 and sum(side > 1 for side in output.shape[1:]) > 1 and 3 not in output.shape[1:2]


def map_axes(output: Tensor) -> str | None:
    """Return the axes of an output of one square image; None if they are not certain."""
    if output.shape[0] != 1:
        return None
    if output.ndim == 3:
        num_tokens = output.shape[1]
        side = math.isqrt(num_tokens)
        return "tokens" if side > 1 and num_tokens - side**2 <= MAX_PREFIX_TOKENS else None
    if output.ndim != 4:
        return None
    is_channels_first, is_channels_last = output.shape[2] == output.shape[3], output.shape[1] == output.shape[2]
    if is_channels_first == is_channels_last:
        return None
    return "NCHW" if is_channels_first else "NHWC"


def _is_bottleneck(call: _Call, last: Any, image: Tensor) -> bool:
    """Whether every path in the autograd graph from the last node to the image passes the output of a call."""
    if last is call.node:
        return True
    pending, visited = [last], {last}
    while pending:
        for parent, output_number in pending.pop().next_functions:
            if getattr(parent, "variable", None) is image:
                return False
            is_output = parent is call.node and output_number == call.output_number
            if parent is not None and not is_output and parent not in visited:
                visited.add(parent)
                pending.append(parent)
    return True
