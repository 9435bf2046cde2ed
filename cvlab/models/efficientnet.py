"""EfficientNet-Lite (Tan and Le, 2019; Liu, 2020): the default network, without the import of a library of models.

The modules are called as in timm's `tf_efficientnet_lite0`, whose weights load by name and whose outputs are the same.

References:
    Tan and Le, 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1, section 3.3;
    Sandler et al., 2018, "MobileNetV2", section 3.3 (inverted residuals); Liu, 2020, "Higher accuracy on vision models
    with EfficientNet-Lite" (no squeeze-and-excitation, ReLU6, first and last layers not scaled).
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
DIVISOR = 8  # of the numbers of channels
BATCHNORM_EPS = 1e-3


@dataclass(frozen=True)
class Stage:
    """A row of table 1: kernel size, stride of the first block, expansion, output channels, number of blocks."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


@dataclass(frozen=True)
class Variant:
    """Multipliers of channels and blocks, and how images are brought in: pixels, and the part that the crop keeps."""

    width: float
    depth: float
    size_px: int
    crop_fraction: float


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, 224, 0.875),
    "efficientnet_lite2": Variant(1.1, 1.2, 260, 0.890),
}


class Conv2dSame(nn.Conv2d):
    """A convolution with the padding of TensorFlow: of the smallest size, the odd pixel at the end."""

    def forward(self, input: Tensor) -> Tensor:
        """Return maps (N, C, ceil(H / stride), ceil(W / stride)) of maps (N, C, H, W)."""
        paddings = []
        for size, kernel, stride in zip(input.shape[-2:], self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            paddings.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = paddings
        padded = F.pad(input, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch normalization with an activation after it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels, eps=BATCHNORM_EPS)
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        """Return maps of the shape of `input`."""
        output: Tensor = self.act(super().forward(input))
        return output


def _conv(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return Conv2dSame(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)


class DepthwiseSeparable(nn.Module):
    """A depthwise convolution and a linear projection, the inverted residual of expansion 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = _conv(in_channels, in_channels, kernel, stride, groups=in_channels)
        self.bn1 = BatchNormAct2d(in_channels, nn.ReLU6(inplace=True))
        self.conv_pw = _conv(in_channels, out_channels)
        self.bn2 = BatchNormAct2d(out_channels, nn.Identity())
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (N, out_channels, H / stride, W / stride) of maps (N, in_channels, H, W)."""
        output: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))
        return output + x if self.has_shortcut else output


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection, and a shortcut where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv_pw = _conv(in_channels, inner)
        self.bn1 = BatchNormAct2d(inner, nn.ReLU6(inplace=True))
        self.conv_dw = _conv(inner, inner, kernel, stride, groups=inner)
        self.bn2 = BatchNormAct2d(inner, nn.ReLU6(inplace=True))
        self.conv_pwl = _conv(inner, out_channels)
        self.bn3 = BatchNormAct2d(out_channels, nn.Identity())
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (N, out_channels, H / stride, W / stride) of maps (N, in_channels, H, W)."""
        inner = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        output: Tensor = self.bn3(self.conv_pwl(inner))
        return output + x if self.has_shortcut else output


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite, from normalized images (N, C, H, W) to logits (N, num_classes).

    Args:
        variant: One of `VARIANTS`.
        num_classes: Number of classes; 0: the network returns the pooled features (N, 1280).
        in_channels: C of the images.

    Attributes:
        num_classes: As above.
    """

    def __init__(self, variant: str, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        scale = VARIANTS[variant]
        self.conv_stem = _conv(in_channels, STEM_CHANNELS, 3, 2)
        self.bn1 = BatchNormAct2d(STEM_CHANNELS, nn.ReLU6(inplace=True))
        stages, channels = [], STEM_CHANNELS
        for index, stage in enumerate(STAGES):
            is_fixed = index in (0, len(STAGES) - 1)
            count = stage.blocks if is_fixed else math.ceil(stage.blocks * scale.depth)
            out_channels = _round_channels(stage.channels * scale.width)
            blocks: list[nn.Module] = []
            for block in range(count):
                stride = stage.stride if block == 0 else 1
                if stage.expansion == 1:
                    blocks.append(DepthwiseSeparable(channels, out_channels, stage.kernel, stride))
                else:
                    blocks.append(InvertedResidual(channels, out_channels, stage.kernel, stride, stage.expansion))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _conv(channels, HEAD_CHANNELS)
        self.bn2 = BatchNormAct2d(HEAD_CHANNELS, nn.ReLU6(inplace=True))
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one; by none, for 0 classes."""
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Linear(HEAD_CHANNELS, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.uniform_(self.classifier.weight, -1 / math.sqrt(num_classes), 1 / math.sqrt(num_classes))  # type: ignore[arg-type]
            nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of normalized images (N, C, H, W)."""
        maps = self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        logits: Tensor = self.classifier(self.global_pool(maps))
        return logits


def _round_channels(channels: float) -> int:
    """Return the nearest multiple of the divisor that is not smaller by more than a tenth (section 3.3)."""
    rounded = max(DIVISOR, int(channels + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * channels else rounded
