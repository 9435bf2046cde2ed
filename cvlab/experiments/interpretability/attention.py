"""Attention rollout of a vision transformer of timm (Abnar and Zuidema, 2020)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import saliency


def rollout(model: PretrainedClassifier, images: Tensor) -> Tensor:
    """Return how much of each patch reaches the tokens that are classified, resized to the images.

    The map is the same for all classes.

    Args:
        model: A ViT or DeiT.
        images: (N, 3, S, S) in [0, 1].

    Returns:
        maps (N, S, S), not negative.

    Raises:
        ConfigError: The model is none of these.
    """
    network = model.module.model
    num_prefix, pool = getattr(network, "num_prefix_tokens", None), getattr(network, "global_pool", None)
    attentions = _record_attention(model.module, images)
    shapes = {tuple(attention.shape[2:]) for attention in attentions}
    num_tokens = next(iter(shapes), (0, 0))[1]
    side = math.isqrt(max(0, num_tokens - (num_prefix or 0)))
    is_flat = len(shapes) == 1 and len(attentions) == len(getattr(network, "blocks", ()))
    is_plain = is_flat and num_prefix is not None and num_prefix + side**2 == num_tokens
    if not is_plain or pool not in ("token", "avg"):
        raise ConfigError(
            "method=rollout: needs a ViT or DeiT of timm, with attention among all patches in each block",
            "gradient, smoothgrad and integrated_gradients work with every model",
        )
    flow = saliency.attention_rollout([attention.float() for attention in attentions])  # (N, T, T)
    num_classified = 2 if hasattr(network, "head_dist") else 1  # a class token, in DeiT also the distillation token
    rows = flow[:, num_prefix:] if pool == "avg" else flow[:, :num_classified]
    maps = rows.mean(1)[:, num_prefix:].view(len(images), 1, side, side)
    return F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


@torch.no_grad()
def _record_attention(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the attention weights (N, heads, T, T) of each block, computed without the fused kernel."""
    layers: list[Any] = [
        layer for layer in module.modules() if hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop")
    ]
    attentions: list[Tensor] = []

    def record(_module: nn.Module, _args: object, output: Tensor) -> None:
        if output.ndim == 4 and output.shape[0] == len(images) and output.shape[2] == output.shape[3]:
            attentions.append(output)

    before = [layer.fused_attn for layer in layers]
    hooks = [layer.attn_drop.register_forward_hook(record) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        module(images)
    finally:
        for layer, is_fused, hook in zip(layers, before, hooks, strict=True):
            layer.fused_attn = is_fused
            hook.remove()
    return attentions
