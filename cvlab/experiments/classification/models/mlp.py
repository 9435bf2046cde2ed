"""A multilayer perceptron with any number of hidden layers and optional dropout (EECS 498, assignment 3)."""

from torch import nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.experiments.classification.models.layer_namespace import LayerNamespace
from cvlab.layers.init import WeightScale, init_weights


def mlp(
    hidden: tuple[PositiveInt, ...],
    dropout: FractionBelowOne = 0.0,
    weight_scale: WeightScale = "kaiming",
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: LayerNamespace = nn,
) -> nn.Module:
    """Build [linear - ReLU - (dropout)] x L - linear.

    Args:
        hidden: Widths of the hidden layers.
        dropout: Probability that a hidden unit is set to 0.
        weight_scale: Standard deviation of the initial weights, or the name of an initialization.
        in_channels: C of the images.
        image_size: H and W of the images.
        num_classes: Number of classes.
        layers: Namespace of the layers.

    Returns:
        A model that maps images (N, C, H, W) to logits (N, num_classes).
    """
    blocks: list[nn.Module] = [nn.Flatten()]
    fan_in = in_channels * image_size * image_size
    for width in hidden:
        blocks += [init_weights(layers.Linear(fan_in, width), weight_scale, before_relu=True), layers.ReLU()]
        if dropout > 0:
            blocks.append(layers.Dropout(dropout))
        fan_in = width
    return nn.Sequential(*blocks, init_weights(layers.Linear(fan_in, num_classes), weight_scale, before_relu=False))
