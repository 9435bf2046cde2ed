"""The fully connected net of EECS 498, assignment 3: any number of hidden layers, optional dropout."""

from typing import Any

from torch import nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.layers.init import WeightScale, init_weights


def mlp(
    hidden: tuple[PositiveInt, ...],
    dropout: FractionBelowOne = 0.0,
    weight_scale: WeightScale = "kaiming",
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: Any = nn,
) -> nn.Module:
    """[linear - ReLU - (dropout)] x L, then one linear layer.

    `hidden` are the widths, `dropout` the probability that a unit is set to 0. Takes (N, in_channels, image_size,
    image_size), gives scores (N, num_classes).
    """
    blocks: list[nn.Module] = [nn.Flatten()]
    width_in = in_channels * image_size * image_size
    for width in hidden:
        blocks += [init_weights(layers.Linear(width_in, width), weight_scale, before_relu=True), layers.ReLU()]
        if dropout > 0:
            blocks.append(layers.Dropout(dropout))
        width_in = width
    return nn.Sequential(*blocks, init_weights(layers.Linear(width_in, num_classes), weight_scale, before_relu=False))
