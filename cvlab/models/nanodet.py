"""The backbone of NanoDet-g, trained for detection on COCO: a small residual network of cross-stage partial blocks.

Its maps of strides 8, 16 and 32 know objects that a classifier's do not have to tell apart from their surroundings, so
detectors that start from it need fewer photos. The batch normalizations of the published network are folded into its
convolutions.

References:
    RangiLyu, 2021, "NanoDet" (`CustomCspNet`, nanodet-g.yml; Apache License 2.0); Wang et al., 2020, "CSPNet: A new
    backbone that can enhance learning capability of CNN", section 3.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

SIZE_PX = 416
BUNDLED_WEIGHTS = Path(__file__).parents[1] / "assets" / "weights" / "nanodet_g.safetensors"
NEGATIVE_SLOPE = 0.1  # of the leaky ReLU
STEM_CHANNELS = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]; published as 0 to 255 in BGR order


class CspStage(NamedTuple):
    """A stage: its input channels, of which it makes twice as many, its residual blocks, and its stride."""

    channels: int
    blocks: int
    stride: int


STAGES = (CspStage(32, 1, 1), CspStage(64, 2, 2), CspStage(128, 2, 2), CspStage(256, 3, 2))


def conv_act(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution with a leaky ReLU after it."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)
    return nn.Sequential(conv, nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True))


class ConcatBlock(nn.Module):
    """Two convolutions of half of the channels each, whose outputs are concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_conv = conv_act(channels, channels // 2)
        self.mid_conv = conv_act(channels // 2, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the shape of `x`."""
        first = self.in_conv(x)
        return torch.cat([self.mid_conv(first), first], 1)


class CspBlock(nn.Module):
    """A convolution, and beside its output that of residual blocks on it."""

    def __init__(self, stage: CspStage) -> None:
        super().__init__()
        channels = stage.channels
        self.in_conv = conv_act(channels, channels, stride=stage.stride)
        self.res_blocks = nn.Sequential(*(ConcatBlock(channels) for _ in range(stage.blocks)))
        self.res_out_conv = conv_act(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (N, 2C, H / stride, W / stride) of maps (N, C, H, W)."""
        shared = self.in_conv(x)
        return torch.cat([self.res_out_conv(self.res_blocks(shared)), shared], 1)


class CspBackbone(nn.Module):
    """The backbone: normalized images (N, 3, H, W) to maps (N, 512, H / 32, W / 32).

    `stages.1`, `stages.2` and `stages.3` give 128, 256 and 512 channels at strides 8, 16 and 32.
    """

    num_classes = 0  # no classifier

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_act(3, STEM_CHANNELS, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.Sequential(*(CspBlock(stage) for stage in STAGES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's maps."""
        maps: Tensor = self.stages(self.pool(self.stem(x)))
        return maps
