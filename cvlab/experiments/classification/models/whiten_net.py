"""A small convolutional network with a whitening first layer, for training runs of seconds to minutes.

References:
    Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", sections 3.1 to 3.4; Coates and Ng, 2012, and the
    first layer of Page, 2019 (whitening); Zagoruyko and Komodakis, 2017 (partial identity, "dirac" initialization).

Differences from the paper:
    Any widths and depth, a choice of activation, optionally fewer whitening filters; `residual` adds the shortcuts of
    the paper's 96 % network.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.errors import ConfigError
from cvlab.experiments.classification.models.layer_namespace import LayerNamespace, LayerType

MAX_WHITENING_IMAGES = 5_000  # enough for the covariance of 12 values
EPS = 5e-4  # as in the paper: limits the gain in the directions of least variance
NORM_EPS = 1e-12
NORM_MOMENTUM = 0.4  # a run has only hundreds of steps, which the running statistics must follow
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU}


def whitening_filters(images: Tensor, kernel: int, eps: float = EPS) -> Tensor:
    """Compute the filters that whiten the patches of images: unit variance, no correlation.

    They are the eigenvectors of the patches' covariance, divided by the square roots of the eigenvalues.

    Args:
        images: Normalized images (N, C, H, W).
        kernel: Side K of the patches in pixels.
        eps: Added to the eigenvalues.

    Returns:
        Filters (C * K * K, C, K, K), float32, by descending eigenvalue.
    """
    channels = images.shape[1]
    total = torch.zeros(channels * kernel**2, channels * kernel**2, dtype=torch.float64)
    count = 0
    for chunk in images.split(500):
        patches = chunk.float().cpu().unfold(2, kernel, 1).unfold(3, kernel, 1)  # (N, C, H', W', K, K)
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, len(total))  # (N * H' * W', C * K * K)
        total += (rows.T @ rows).double()
        count += len(rows)
    values, vectors = torch.linalg.eigh(total / count)
    filters = (vectors / (values.clamp(min=0) + eps).sqrt()).T.flip(0)  # a row for each eigenvector
    kernels: Tensor = filters.reshape(-1, channels, kernel, kernel).float()
    return kernels


class ConvBlock(nn.Module):
    """Conv - max pool 2x2 - norm - act, then (conv - norm - act) x (depth - 1), the last act after the shortcut."""

    def __init__(
        self, width_in: int, width: int, depth: int, residual: bool, act: LayerType, layers: LayerNamespace
    ) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(width_in, width, layers), layers.MaxPool2d(2), _norm(width, layers), act())
        inner: list[nn.Module] = []
        for _ in range(1, depth):
            inner += [_conv(width, width, layers), _norm(width, layers), act()]
        self.inner = nn.Sequential(*inner[:-1])
        self.act = act()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width, H // 2, W // 2) for x (N, C, H, W)."""
        x = self.first(x)
        if len(self.inner) == 0:
            return x
        y = self.inner(x)
        out: Tensor = self.act(x + y if self.residual else y)
        return out


class Head(nn.Module):
    """Global max pooling, then a linear layer without bias whose output is scaled."""

    def __init__(self, linear: nn.Module, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, C, H, W)."""
        # the gradient of amax compares x with its maximum, which is never equal where a compiler recomputes x
        logits: Tensor = self.linear(F.adaptive_max_pool2d(x, 1).flatten(1)) * self.scale
        return logits


class WhitenNet(nn.Sequential):
    """The network; `init_from_images` initializes its first layer before training."""

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        """Initialize the first layer with whitening filters of normalized images (N, C, H, W), and their negatives.

        A layer with fewer filters gets those with the largest eigenvalues.
        """
        whiten: Any = self[0]
        filters = whitening_filters(images[:MAX_WHITENING_IMAGES], whiten.kernel_size[0])[: whiten.out_channels // 2]
        whiten.weight.copy_(torch.cat([filters, -filters]))


def _conv(width_in: int, width: int, layers: LayerNamespace) -> nn.Module:
    """Build a 3x3 convolution without bias, initialized to pass on as many input channels as it has outputs."""
    conv: nn.Module = layers.Conv2d(width_in, width, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:width_in])  # type: ignore[index]
    return conv


def _norm(width: int, layers: LayerNamespace) -> nn.Module:
    """Build a BatchNorm with a learned shift and a fixed scale of 1."""
    norm: nn.Module = layers.BatchNorm2d(width, eps=NORM_EPS, momentum=NORM_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm


def whiten_net(
    widths: tuple[PositiveInt, ...] = (64, 256, 256),
    depth: PositiveInt = 2,
    residual: bool = False,
    activation: Literal["relu", "silu", "gelu"] = "gelu",
    train_whitening_bias: bool = True,
    head_scale: Annotated[float, Gt(0), Le(10)] = 0.111,
    max_whitening_filters: PositiveInt | None = None,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: LayerNamespace = nn,
) -> nn.Module:
    """Build whitening conv 2x2 - act - blocks that each halve the spatial size - global max pooling - linear.

    The whitening filters are computed from the training images and frozen.

    Args:
        widths: Channels of each block.
        depth: Convolutions of each block.
        residual: Whether blocks have a shortcut around all but their first convolution.
        activation: The activation function.
        train_whitening_bias: False saves the gradient with respect to the input of the largest layer.
        head_scale: Factor of the logits.
        max_whitening_filters: Maximum number of whitening filters, of which there are 4 C; those with the largest
            eigenvalues are used. Fewer make the first block, the most expensive one, faster. None: all.
        in_channels: C of the images.
        image_size: H and W of the images.
        num_classes: Number of classes.
        layers: Namespace of the layers.

    Returns:
        A model that maps images (N, C, H, W) to logits (N, num_classes).
    """
    if not widths or (image_size - 1) >> len(widths) < 1:
        raise ConfigError(f"model.widths: {len(widths)} halvings leave no pixel of {image_size - 1} px")
    num_filters = min(4 * in_channels, max_whitening_filters or 4 * in_channels)
    act = layers.ReLU if activation == "relu" else ACTIVATIONS[activation]
    whiten = layers.Conv2d(in_channels, 2 * num_filters, 2)
    nn.init.zeros_(whiten.bias)  # type: ignore[arg-type]
    whiten.weight.requires_grad_(False)
    whiten.bias.requires_grad_(train_whitening_bias)
    blocks = [
        ConvBlock(width_in, width, depth, residual, act, layers)
        for width_in, width in zip((2 * num_filters, *widths), widths, strict=False)
    ]
    head = Head(layers.Linear(widths[-1], num_classes, bias=False), head_scale)
    return WhitenNet(whiten, act(), *blocks, head)
