"""The neck of a detector: a feature pyramid that mixes maps of several resolutions top-down, then bottom-up.

References: Lin et al., 2017, "Feature pyramid networks"; Liu et al., 2018, "Path aggregation network"; Howard et al.,
2017, "MobileNets" (depthwise separable convolutions); Tan et al., 2020, "EfficientDet" (a batch norm for each level).
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def separable_conv(channels: int, stride: int = 1) -> nn.Sequential:
    """Return a depthwise 3x3 and a pointwise convolution with batch norm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(inplace=True),
    )


def pointwise_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a pointwise convolution with batch norm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.SiLU(inplace=True)
    )


class LevelSeparableConv(nn.Module):
    """A `separable_conv` for all levels of a pyramid: shared filters, one batch norm per level.

    With one batch norm for all levels, each level is normalized by its own statistics in training and by those of no
    level in evaluation: boxes come out a tenth too large.
    """

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(num_levels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Map the (N, C, H, W) of a level to the same shape."""
        return F.silu(self.norms[level](self.pointwise(self.depthwise(x))), inplace=True)


class Tower(nn.Module):
    """A stack of `depth` level-separable convolutions and a pointwise one that predicts `out_channels`."""

    def __init__(self, channels: int, out_channels: int, num_levels: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LevelSeparableConv(channels, num_levels) for _ in range(depth))
        self.predictor = nn.Conv2d(channels, out_channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map each level's (N, C, H, W) to (N, out_channels, H, W)."""
        predictions = []
        for level, x in enumerate(maps):
            for block in self.blocks:
                x = cast("Tensor", block(x, level))
            predictions.append(cast("Tensor", self.predictor(x)))
        return predictions


class FeaturePyramid(nn.Module):
    """Mixes maps (N, C_k, H_k, W_k), each of half the resolution of the one before, to `width` channels each."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([pointwise_conv(count, width) for count in channels])
        self.top_down = nn.ModuleList([separable_conv(width) for _ in channels[1:]])
        self.downsample = nn.ModuleList([separable_conv(width, 2) for _ in channels[1:]])
        self.bottom_up = nn.ModuleList([separable_conv(width) for _ in channels[1:]])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the mixed maps (N, width, H_k, W_k)."""
        mixed = [project(m) for project, m in zip(self.lateral, maps, strict=True)]
        for k in range(len(mixed) - 1, 0, -1):
            upsampled = F.interpolate(mixed[k], size=mixed[k - 1].shape[2:], mode="nearest")
            mixed[k - 1] = self.top_down[k - 1](mixed[k - 1] + upsampled)
        for k in range(1, len(mixed)):
            mixed[k] = self.bottom_up[k - 1](mixed[k] + self.downsample[k - 1](mixed[k - 1]))
        return mixed
