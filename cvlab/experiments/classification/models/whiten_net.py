"""A small residual-free net that starts from whitened patches, for trainings of seconds to minutes.

Paper: Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", sections 3.1 to 3.4; whitening after Coates and
Ng, 2012, and the first layer of Page, 2019; partial identity ("dirac") initialisation after Zagoruyko and Komodakis,
2017. Differs: any widths and depth, a choice of activation, shortcuts as in the paper's 96 % net by `residual`.
"""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.errors import ConfigError

WHITENED_IMAGES = 5_000  # the covariance of 12 numbers needs no more
EPS = 5e-4  # the paper's: keeps the directions of least variance from being blown up
NORM_EPS = 1e-12
NORM_MOMENTUM = 0.4  # a run has hundreds of steps: running statistics must follow quickly
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU}


def whitening_filters(images: Tensor, kernel: int, eps: float = EPS) -> Tensor:
    """Return the filters that turn patches of images (N, C, H, W) into numbers with variance 1 and no correlation.

    They are the eigenvectors of the patches' covariance over the roots of its eigenvalues, the largest first:
    (C * K * K, C, K, K), float32.
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
    filters = (vectors / (values.clamp(min=0) + eps).sqrt()).T.flip(0)  # a row for each direction
    shaped: Tensor = filters.reshape(-1, channels, kernel, kernel).float()
    return shaped


class ConvBlock(nn.Module):
    """Conv - max pool 2x2 - norm - act, then `depth - 1` times conv - norm - act, the last act after the shortcut."""

    def __init__(
        self, width_in: int, width: int, depth: int, residual: bool, act: type[nn.Module], layers: Any
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
        """Map (N, C, H, W) to (N, width, H // 2, W // 2)."""
        x = self.first(x)
        if len(self.inner) == 0:
            return x
        y = self.inner(x)
        out: Tensor = self.act(x + y if self.residual else y)
        return out


class Head(nn.Module):
    """The largest value of each channel, then a linear layer without bias, scaled down."""

    def __init__(self, linear: nn.Module, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to scores (N, num_classes)."""
        scores: Tensor = self.linear(x.amax((2, 3))) * self.scale
        return scores


class WhitenNet(nn.Sequential):
    """The net; `fit_to` sets its first layer from images before the training."""

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        """Set the first layer to the whitening filters of normalised images (N, C, H, W), each with both signs."""
        whiten: Any = self[0]
        filters = whitening_filters(images[:WHITENED_IMAGES], whiten.kernel_size[0])
        whiten.weight.copy_(torch.cat([filters, -filters]))


def _conv(width_in: int, width: int, layers: Any) -> nn.Module:
    """Build a 3x3 convolution without bias that at first passes its inputs on, as far as it has outputs for them."""
    conv: nn.Module = layers.Conv2d(width_in, width, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:width_in])  # type: ignore[index]
    return conv


def _norm(width: int, layers: Any) -> nn.Module:
    """Build a BatchNorm that learns a shift and no scale."""
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
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: Any = nn,
) -> nn.Module:
    """Whitening conv 2x2 - act, a block of `depth` convolutions for each of `widths`, each halving the size, a head.

    The whitening filters come from the training images and are not trained; their bias is, unless
    `train_whitening_bias` is false, which saves the gradient of the largest layer's input. Takes (N, in_channels,
    image_size, image_size), gives scores (N, num_classes).
    """
    if not widths or (image_size - 1) >> len(widths) < 1:
        raise ConfigError(f"model.widths: {len(widths)} halvings leave nothing of {image_size - 1} px")
    act = layers.ReLU if activation == "relu" else ACTIVATIONS[activation]
    whiten = layers.Conv2d(in_channels, 2 * 4 * in_channels, 2)
    nn.init.zeros_(whiten.bias)
    whiten.weight.requires_grad_(False)
    whiten.bias.requires_grad_(train_whitening_bias)
    blocks = [
        ConvBlock(width_in, width, depth, residual, act, layers)
        for width_in, width in zip((2 * 4 * in_channels, *widths), widths, strict=False)
    ]
    head = Head(layers.Linear(widths[-1], num_classes, bias=False), head_scale)
    return WhitenNet(whiten, act(), *blocks, head)
