"""Pre-activation residual nets for small images, and the plain nets they are compared with.

Paper: He et al., 2016, "Identity mappings in deep residual networks", figure 4(e); bottleneck: He et al., 2015,
figure 5. Differs: narrow stages for CIFAR-10, as in EECS 498, assignment 4.
"""

from typing import Any, Literal

from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.errors import ConfigError
from cvlab.layers.init import init_weights


def _unit(layers: Any, width_in: int, width: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """BatchNorm - ReLU - convolution that keeps the size but for its stride."""
    conv = layers.Conv2d(width_in, width, kernel, stride=stride, padding=kernel // 2)
    return [layers.BatchNorm2d(width_in), layers.ReLU(), conv]


def plain_block(layers: Any, width_in: int, width: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions."""
    return nn.Sequential(*_unit(layers, width_in, width, 3, stride), *_unit(layers, width, width, 3))


def bottleneck_block(layers: Any, width_in: int, width: int, stride: int) -> nn.Module:
    """Narrow to a quarter by 1x1, convolve 3x3, widen by 1x1."""
    inner = width // 4
    return nn.Sequential(
        *_unit(layers, width_in, inner, 1, stride), *_unit(layers, inner, inner, 3), *_unit(layers, inner, width, 1)
    )


class Residual(nn.Module):
    """A block beside a shortcut: block(x) + shortcut(x)."""

    def __init__(self, block: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.block, self.shortcut = block, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H / stride, W / stride)."""
        out: Tensor = self.block(x) + self.shortcut(x)
        return out


class GlobalAveragePool(nn.Module):
    """The mean over all places."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C)."""
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
    layers: Any = nn,
) -> nn.Module:
    """Conv 3x3 - ReLU, stages of blocks, mean over all places, one linear layer.

    `stages` are (channels, blocks); every stage but the first halves the size. Without `residual` the same blocks have
    no shortcuts. The shortcut is the identity, or a 1x1 convolution where size or channels change. `init` is torch's
    own or Kaiming's, whose weights have 6 times the variance: before a BatchNorm that is a sixth of the learning rate
    (van Laarhoven, 2017, section 2). Takes (N, in_channels, image_size, image_size), gives scores (N, num_classes).
    """
    if not stages or image_size >> (len(stages) - 1) < 1:
        raise ConfigError(f"model.stages: {len(stages)} stages do not fit {image_size} px")
    if bottleneck and any(width < 4 for width, _ in stages):
        raise ConfigError("model.stages: a bottleneck needs at least 4 channels")
    make = bottleneck_block if bottleneck else plain_block
    first = layers.Conv2d(in_channels, stem, 3, padding=1)
    blocks: list[nn.Module] = [first, layers.ReLU()]
    width_in = stem
    for index, (width, count) in enumerate(stages):
        for place in range(count):
            stride = 2 if place == 0 and index > 0 else 1
            block = make(layers, width_in, width, stride)
            blocks.append(Residual(block, _shortcut(layers, width_in, width, stride)) if residual else block)
            width_in = width
    net = nn.Sequential(*blocks, GlobalAveragePool(), layers.Linear(width_in, num_classes))
    if init == "kaiming":
        _kaiming(net)
    return net


def _kaiming(net: nn.Module) -> None:
    """Draw all weights anew; all but those of the shortcuts and of the last layer stand before a ReLU."""
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            init_weights(layer, "kaiming", before_relu=isinstance(layer, nn.Conv2d) and "shortcut" not in name)


def _shortcut(layers: Any, width_in: int, width: int, stride: int) -> nn.Module:
    if width_in == width and stride == 1:
        return nn.Identity()
    shortcut: nn.Module = layers.Conv2d(width_in, width, 1, stride=stride)
    return shortcut
