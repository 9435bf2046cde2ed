"""One small net at three levels of PyTorch: raw tensors, `nn.Module`, `nn.Sequential`. EECS 498, assignment 4.

Convolution 5x5 - ReLU - convolution 3x3 - ReLU - linear; both convolutions keep the size. The three have the same
weights in the same order, drawn in the same order, and give the same scores.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.layers.init import init_weights


def _layers(
    channels: tuple[int, int], in_channels: int, image_size: int, num_classes: int, layers: Any
) -> tuple[nn.Module, nn.Module, nn.Module]:
    one, two = channels
    return (
        init_weights(layers.Conv2d(in_channels, one, 5, padding=2), "kaiming", before_relu=True),
        init_weights(layers.Conv2d(one, two, 3, padding=1), "kaiming", before_relu=True),
        init_weights(layers.Linear(two * image_size * image_size, num_classes), "kaiming", before_relu=False),
    )


def functional_forward(images: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return scores (N, classes) of images (N, C, H, W) by plain functions of six tensors: three weights and biases."""
    conv1_w, conv1_b, conv2_w, conv2_b, fc_w, fc_b = weights
    x = F.relu(F.conv2d(images, conv1_w, conv1_b, padding=2))
    x = F.relu(F.conv2d(x, conv2_w, conv2_b, padding=1))
    return F.linear(x.flatten(1), fc_w, fc_b)


class ApiBarebones(nn.Module):
    """The net as tensors and functions; the module only holds the tensors, so that they can be trained and saved."""

    def __init__(
        self,
        channels: tuple[PositiveInt, PositiveInt] = (32, 16),
        *,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        made = _layers(channels, in_channels, image_size, num_classes, nn)
        self.weights = nn.ParameterList(parameter for layer in made for parameter in layer.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, in_channels, image_size, image_size) to scores (N, num_classes)."""
        return functional_forward(images, list(self.weights))


class ApiModule(nn.Module):
    """The net as a module of layers with a forward of its own."""

    def __init__(
        self,
        channels: tuple[PositiveInt, PositiveInt] = (32, 16),
        *,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        layers: Any = nn,
    ) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = _layers(channels, in_channels, image_size, num_classes, layers)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, in_channels, image_size, image_size) to scores (N, num_classes)."""
        x = F.relu(self.conv1(images))
        x = F.relu(self.conv2(x))
        scores: Tensor = self.fc(x.flatten(1))
        return scores


def api_sequential(
    channels: tuple[PositiveInt, PositiveInt] = (32, 16),
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: Any = nn,
) -> nn.Module:
    """List the net's layers, with nothing else to write."""
    conv1, conv2, fc = _layers(channels, in_channels, image_size, num_classes, layers)
    return nn.Sequential(conv1, layers.ReLU(), conv2, layers.ReLU(), nn.Flatten(), fc)
