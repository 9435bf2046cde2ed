"""The neck of a detector: maps of several resolutions, mixed from coarse to fine and back.

Papers: Lin et al., 2017, "Feature pyramid networks"; Liu et al., 2018, "Path aggregation network"; Howard et al., 2017,
"MobileNets" (depthwise convolutions); Tan et al., 2020, "EfficientDet" (normalisations of their own for each map).
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def separable(channels: int, stride: int = 1) -> nn.Sequential:
    """Return a depthwise 3x3 convolution and a pointwise one, normalised."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(inplace=True),
    )


class LevelSeparable(nn.Module):
    """`separable` for maps of several resolutions: the filters are shared, each map has a normalisation of its own.

    With one for all of them each map is normalised by its own statistics in training, and by those of no map
    afterwards: boxes come out a tenth too large.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(levels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Map (N, C, H, W) of a level to the same shape."""
        return F.silu(self.norms[level](self.pointwise(self.depthwise(x))), inplace=True)


class Tower(nn.Module):
    """`depth` such blocks, one after the other, and a last pointwise convolution."""

    def __init__(self, channels: int, outside: int, levels: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LevelSeparable(channels, levels) for _ in range(depth))
        self.last = nn.Conv2d(channels, outside, 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map each level's (N, C, H, W) to (N, outside, H, W)."""
        made = []
        for level, x in enumerate(maps):
            for block in self.blocks:
                x = cast("Tensor", block(x, level))
            made.append(cast("Tensor", self.last(x)))
        return made


def projection(inside: int, outside: int) -> nn.Sequential:
    """Return a pointwise convolution, normalised."""
    return nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside), nn.SiLU(inplace=True))


class Pyramid(nn.Module):
    """Maps (N, C_k, H_k, W_k), each of half the resolution of the one before, to as many of `width` channels."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([projection(count, width) for count in channels])
        self.down = nn.ModuleList([separable(width) for _ in channels[1:]])
        self.up = nn.ModuleList([separable(width, 2) for _ in channels[1:]])
        self.mix = nn.ModuleList([separable(width) for _ in channels[1:]])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the mixed maps (N, width, H_k, W_k)."""
        mixed = [project(m) for project, m in zip(self.lateral, maps, strict=True)]
        for k in range(len(mixed) - 1, 0, -1):
            upper = F.interpolate(mixed[k], size=mixed[k - 1].shape[2:], mode="nearest")
            mixed[k - 1] = self.down[k - 1](mixed[k - 1] + upper)
        for k in range(1, len(mixed)):
            mixed[k] = self.mix[k - 1](mixed[k] + self.up[k - 1](mixed[k - 1]))
        return mixed
