"""Weight initialization: Kaiming's, or a normal of a fixed scale; biases zero."""

from typing import Annotated, Literal

from annotated_types import Gt, Le
from torch import nn

WeightScale = Literal["kaiming"] | Annotated[float, Gt(0), Le(10)]


def init_weights(layer: nn.Module, weight_scale: float | str, before_relu: bool) -> nn.Module:
    """Draw the weight of a linear or convolutional layer from N(0, std^2), its bias set to 0, and return the layer.

    Kaiming (He et al., 2015, equation 10): std = sqrt(gain / fan_in), gain 2 before a ReLU, else 1; fan_in = D_in, or
    C_in * K * K. Otherwise std is `weight_scale` itself.
    """
    weight = layer.weight
    fan_in = weight[0].numel()  # type: ignore[index]
    gain = 2.0 if before_relu else 1.0
    std = (gain / fan_in) ** 0.5 if isinstance(weight_scale, str) else float(weight_scale)
    nn.init.normal_(weight, 0.0, std)  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
