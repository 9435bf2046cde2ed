"""A one-stage, anchor-free detector: a feature pyramid over three levels and one head that they share.

References: those of dense.py. The pyramid is that of fpn.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import PositiveInt
from cvlab.experiments.detection.models import dense
from cvlab.experiments.detection.models.dense import DenseHead, DenseOutputs
from cvlab.experiments.detection.models.fpn import FeaturePyramid, Tower
from cvlab.ops import assignment

PRIOR_PROBABILITY = 1e-3  # of every class at every point at the start: few of thousands of points are positive


class YoloFpn(DenseHead):
    """Class logits and a box at every cell of three feature maps."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: PositiveInt = 96, depth: PositiveInt = 2
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fpn = FeaturePyramid(channels, width)
        self.class_tower = Tower(width, num_classes, len(channels), depth)
        self.box_tower = Tower(width, 4, len(channels), depth)
        self.scales = nn.Parameter(torch.ones(len(channels)))
        bias = self.class_tower.predictor.bias
        assert bias is not None
        nn.init.constant_(bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def forward(self, features: Sequence[Tensor]) -> DenseOutputs:
        """Predict from feature maps (N, C_k, S / stride_k, S / stride_k), highest resolution first."""
        maps = self.fpn(features)
        points = assignment.grid_points([m.shape[2:] for m in maps], self.strides).to(features[0].device)
        logits = torch.cat([m.flatten(2) for m in self.class_tower(maps)], 2).mT.float()  # (N, P, C)
        distances = [
            F.softplus(m.flatten(2).float() * scale) for m, scale in zip(self.box_tower(maps), self.scales, strict=True)
        ]
        ltrb = torch.cat(distances, 2).mT * points[:, 2:]  # (N, P, 4): left, top, right, bottom
        return DenseOutputs(logits, dense.decode(points, ltrb), points)
