"""One small network at three API levels of PyTorch: tensors, `nn.Module` and `nn.Sequential` (EECS 498, assignment 4).

Conv 5x5 - ReLU - conv 3x3 - ReLU - linear; both convolutions preserve the spatial size. The three versions have
the same weights in the same order, initialized in the same order, and return the same logits.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.experiments.classification.models.layer_namespace import LayerNamespace
from cvlab.layers.init import init_weights


def _build_layers(
    channels: tuple[int, int], in_channels: int, image_size: int, num_classes: int, layers: LayerNamespace
) -> tuple[nn.Module, nn.Module, nn.Module]:
    channels1, channels2 = channels
    return (
        init_weights(layers.Conv2d(in_channels, channels1, 5, padding=2), "kaiming", before_relu=True),
        init_weights(layers.Conv2d(channels1, channels2, 3, padding=1), "kaiming", before_relu=True),
        init_weights(layers.Linear(channels2 * image_size * image_size, num_classes), "kaiming", before_relu=False),
    )


def functional_forward(images: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return logits (N, num_classes) of images (N, C, H, W), given the weight and bias of each of the three layers."""
    conv1_w, conv1_b, conv2_w, conv2_b, fc_w, fc_b = weights
    x = F.relu(F.conv2d(images, conv1_w, conv1_b, padding=2))
    x = F.relu(F.conv2d(x, conv2_w, conv2_b, padding=1))
    return F.linear(x.flatten(1), fc_w, fc_b)


class ApiBarebones(nn.Module):
    """The network as tensors and functions; the module only registers the tensors, to be trained and saved."""

    def __init__(
        self,
        channels: tuple[PositiveInt, PositiveInt] = (32, 16),
        *,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        modules = _build_layers(channels, in_channels, image_size, num_classes, nn)
        self.weights = nn.ParameterList(parameter for layer in modules for parameter in layer.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, image_size, image_size)."""
        return functional_forward(images, list(self.weights))


class ApiModule(nn.Module):
    """The network as a module of layers with its own forward method."""

    def __init__(
        self,
        channels: tuple[PositiveInt, PositiveInt] = (32, 16),
        *,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        layers: LayerNamespace = nn,
    ) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = _build_layers(channels, in_channels, image_size, num_classes, layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, image_size, image_size)."""
        x = F.relu(self.conv1(images))
        x = F.relu(self.conv2(x))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def api_sequential(
    channels: tuple[PositiveInt, PositiveInt] = (32, 16),
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: LayerNamespace = nn,
) -> nn.Module:
    """Build the network as a sequence of layers, which needs no forward method."""
    conv1, conv2, fc = _build_layers(channels, in_channels, image_size, num_classes, layers)
    return nn.Sequential(conv1, layers.ReLU(), conv2, layers.ReLU(), nn.Flatten(), fc)
