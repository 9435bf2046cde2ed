"""Labeled images of a split, and a trained classifier together with them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabeledClassifier:
    """A trained classifier and a split of the data set that it was trained on.

    Attributes:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits (N, K) in float32, differentiable.
        images: A function from a range of images to these, uint8 (N, H, W, C).
        labels: int64 (M,), of all images of the split.
        classes: Names of the K classes.
        data: Name of the data set.
        device: Where the images and the classifier are.
    """

    logits_fn: Callable[[Tensor], Tensor]
    images: Callable[[slice], Tensor]
    labels: Tensor
    classes: tuple[str, ...]
    data: str
    device: torch.device


def to_pixels(images: Tensor) -> Tensor:
    """Return images, uint8 (N, H, W, C), as (N, C, H, W) in [0, 1]."""
    return images.permute(0, 3, 1, 2).float().div(255).contiguous()


@dataclass(frozen=True)
class LabeledImages:
    """A split of a data set.

    Attributes:
        images: A function from indices, int64 (N,), to these images, uint8 (N, H, W, C).
        labels: int64 (M,), of all images of the split.
        classes: Names of the classes.
        data: Name of the data set.
        split: Name of the split.
    """

    images: Callable[[Tensor], Tensor]
    labels: Tensor
    classes: tuple[str, ...]
    data: str
    split: str
