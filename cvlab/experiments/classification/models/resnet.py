"""Pre-activation residual networks for small images, and the plain networks that they are compared with.

References:
    He et al., 2016, "Identity mappings in deep residual networks", figure 4(e); He et al., 2015, figure 5 (bottleneck).

Differences from the paper:
    Narrow stages for CIFAR-10, as in EECS 498, assignment 4.
"""

from typing import Literal

from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.errors import ConfigError
from cvlab.experiments.classification.models.layer_namespace import LayerNamespace
from cvlab.layers.init import init_weights


def _preact_conv(layers: LayerNamespace, width_in: int, width: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return BatchNorm - ReLU - convolution with same padding."""
    conv = layers.Conv2d(width_in, width, kernel, stride=stride, padding=kernel // 2)
    return [layers.BatchNorm2d(width_in), layers.ReLU(), conv]


def plain_block(layers: LayerNamespace, width_in: int, width: int, stride: int) -> nn.Module:
    """Build two 3x3 convolutions."""
    return nn.Sequential(*_preact_conv(layers, width_in, width, 3, stride), *_preact_conv(layers, width, width, 3))


def bottleneck_block(layers: LayerNamespace, width_in: int, width: int, stride: int) -> nn.Module:
    """Build a 1x1 convolution to a quarter of the channels, a 3x3 convolution, and a 1x1 convolution back."""
    inner = width // 4
    return nn.Sequential(
        *_preact_conv(layers, width_in, inner, 1, stride),
        *_preact_conv(layers, inner, inner, 3),
        *_preact_conv(layers, inner, width, 1),
    )


class Residual(nn.Module):
    """A residual connection: block(x) + shortcut(x)."""

    def __init__(self, block: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.block, self.shortcut = block, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H / stride, W / stride) for x (N, C, H, W)."""
        out: Tensor = self.block(x) + self.shortcut(x)
        return out


class GlobalAveragePool(nn.Module):
    """The mean over all spatial positions."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C) for x (N, C, H, W)."""
        return x.mean((2, 3))


def preact_resnet(
    stem: PositiveInt = 8,
    stages: tuple[tuple[PositiveInt, PositiveInt], ...] = ((8, 5), (16, 5), (32, 5)),
    residual: bool = True,
    bottleneck: bool = False,
    init: Literal["torch", "kaiming"] = "torch",
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: LayerNamespace = nn,
) -> nn.Module:
    """Build conv 3x3 - ReLU - stages of residual blocks - global average pooling - linear.

    The shortcut is the identity, or a 1x1 convolution if the size or the number of channels changes.

    Args:
        stem: Channels of the first convolution.
        stages: (channels, number of blocks) of each stage; every stage but the first halves the spatial size.
        residual: False for the same blocks without shortcuts.
        bottleneck: Whether blocks are bottlenecks instead of two 3x3 convolutions.
        init: `torch`, or `kaiming`, whose weights have 6 times the variance: before a BatchNorm this divides the
            effective learning rate by 6 (van Laarhoven, 2017, section 2).
        in_channels: C of the images.
        image_size: H and W of the images.
        num_classes: Number of classes.
        layers: Namespace of the layers.

    Returns:
        A model that maps images (N, C, H, W) to logits (N, num_classes).
    """
    if not stages or image_size >> (len(stages) - 1) < 1:
        raise ConfigError(f"model.stages: {len(stages)} stages do not fit {image_size} px")
    if bottleneck and any(width < 4 for width, _ in stages):
        raise ConfigError("model.stages: a bottleneck needs at least 4 channels")
    build_block = bottleneck_block if bottleneck else plain_block
    first = layers.Conv2d(in_channels, stem, 3, padding=1)
    blocks: list[nn.Module] = [first, layers.ReLU()]
    width_in = stem
    for index, (width, count) in enumerate(stages):
        for block_index in range(count):
            stride = 2 if block_index == 0 and index > 0 else 1
            block = build_block(layers, width_in, width, stride)
            blocks.append(Residual(block, _shortcut(layers, width_in, width, stride)) if residual else block)
            width_in = width
    model = nn.Sequential(*blocks, GlobalAveragePool(), layers.Linear(width_in, num_classes))
    if init == "kaiming":
        _kaiming_init(model)
    return model


def _kaiming_init(model: nn.Module) -> None:
    """Reinitialize all weights; all but those of the shortcuts and of the last layer precede a ReLU."""
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            init_weights(layer, "kaiming", before_relu=isinstance(layer, nn.Conv2d) and "shortcut" not in name)


def _shortcut(layers: LayerNamespace, width_in: int, width: int, stride: int) -> nn.Module:
    if width_in == width and stride == 1:
        return nn.Identity()
    shortcut: nn.Module = layers.Conv2d(width_in, width, 1, stride=stride)
    return shortcut
