"""Weight initialization: Kaiming's, or a normal distribution of a fixed scale; biases are zero."""

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Le

if TYPE_CHECKING:
    from torch import nn

WeightScale = Literal["kaiming"] | Annotated[float, Gt(0), Le(10)]


def init_weights(layer: "nn.Module", weight_scale: float | str, before_relu: bool) -> "nn.Module":
    """Draw the weight of a layer from N(0, std^2), and set its bias to 0.

    References:
        He et al., 2015, "Delving deep into rectifiers", equation 10: std = sqrt(gain / fan_in).

    Args:
        layer: Linear or convolutional; changed in place. fan_in is D_in, or C_in * K * K.
        weight_scale: "kaiming", or std itself.
        before_relu: Whether a ReLU follows; Kaiming's gain is 2 then, else 1.

    Returns:
        The layer.
    """
    from torch import nn

    weight = layer.weight
    fan_in = weight[0].numel()  # type: ignore[index]
    gain = 2.0 if before_relu else 1.0
    std = (gain / fan_in) ** 0.5 if isinstance(weight_scale, str) else float(weight_scale)
    nn.init.normal_(weight, 0.0, std)  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
