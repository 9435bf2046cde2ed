"""How well a saliency map names the pixels that a prediction depends on.

References:
    Petsiuk et al., 2018, "RISE: Randomized input sampling for explanation of black-box models", section 4.3.
    Adebayo et al., 2018, "Sanity checks for saliency maps", section 3 (`randomize_last_layers`, `rank_correlation`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvlab.ops import visualize

BLUR = 5 / 224  # standard deviation of the blur, as a fraction of the image's side


@dataclass(frozen=True)
class Curves:
    """The probability of a class after each step of insertion and of deletion; float32 (steps + 1,) each.

    Attributes:
        insertion: Starts with the blurred image, ends with the image.
        deletion: Starts with the image, ends with the fill.
    """

    insertion: Tensor
    deletion: Tensor

    def areas(self) -> dict[str, float]:
        """Return the area under each curve, in [0, 1]: a good map has a high `insertion` and a low `deletion`."""
        return {"insertion": _area(self.insertion), "deletion": _area(self.deletion)}


def insertion_and_deletion(
    probability: Callable[[Tensor], Tensor], image: Tensor, saliency: Tensor, fill: Tensor, steps: int, batch_size: int
) -> Curves:
    """Insert the pixels of an image into its blurred copy, and delete them, the most important ones first.

    Args:
        probability: Maps images (N, 3, H, W) to the probability (N,) of the class.
        image: (3, H, W) in [0, 1].
        saliency: (H, W), high where a pixel is important. Of equal pixels, the upper left come first.
        fill: Color (3,) of deleted pixels.
        steps: Number of steps, each of H * W / steps pixels.
        batch_size: Number of images in a forward pass.

    Returns:
        The curves.
    """
    num_pixels = saliency.numel()
    ranks = torch.empty(num_pixels, dtype=torch.int64, device=image.device)
    order = saliency.flatten().argsort(descending=True, stable=True)
    ranks[order] = torch.arange(num_pixels, device=image.device)
    ranks = ranks.view(saliency.shape)
    blurred = visualize.gaussian_blur(image[None], BLUR * image.shape[-1])[0]
    empty = fill[:, None, None].expand_as(image)
    curves = []
    for first, last in ((blurred, image), (image, empty)):
        values = []
        for chunk in torch.arange(steps + 1, device=image.device).split(batch_size):
            is_changed = ranks < (chunk * num_pixels / steps).round()[:, None, None]  # (n, H, W)
            values.append(probability(torch.where(is_changed[:, None], last, first)).float())
        curves.append(torch.cat(values).cpu())
    return Curves(*curves)


def _area(curve: Tensor) -> float:
    """Return the area under a curve (K,) over equally spaced points in [0, 1]."""
    return float(torch.trapezoid(curve.double()) / (len(curve) - 1))


@torch.no_grad()
def randomize_last_layers(model: nn.Module, fraction: float, seed: int) -> nn.Module:
    """Return a copy of a model whose last layers have their weights in random order, which keeps their scale.

    Args:
        model: any.
        fraction: Fraction of the linear layers and convolutions, by the order of registration; at least the last one.
        seed: Seed of the order.
    """
    randomized = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in randomized.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers[-max(1, round(fraction * len(layers))) :]:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view(parameter.shape))
    return randomized


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation in [-1, 1] of two maps of one shape; equal values share their mean rank.

    A map of equal values has no order: the correlation is 0, or 1 if both are.
    """
    ranks = [_mean_ranks(values.flatten().double()) for values in (a, b)]
    centered = [rank - rank.mean() for rank in ranks]
    norms = [float(rank.norm()) for rank in centered]
    if min(norms) == 0:
        return float(max(norms) == 0)
    return float(centered[0] @ centered[1]) / (norms[0] * norms[1])


def _mean_ranks(values: Tensor) -> Tensor:
    """Return the rank of each value of (K,), the mean of those of equal values."""
    _, numbers, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[numbers]
    return ranks
