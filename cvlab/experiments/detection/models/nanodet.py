"""NanoDet-g: a light one-stage detector whose weights are trained on COCO, to be used or fine-tuned.

References: RangiLyu, 2021, "NanoDet" (nanodet-g.yml; Apache License 2.0); Li et al., 2020, "Generalized focal loss" (a
distance to an edge is a distribution over whole strides); Liu et al., 2018, "Path aggregation network", here without
convolutions. Differences from the published training: task-aligned assignment (Feng et al., 2021).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvlab.experiments.common import weights as common_weights
from cvlab.experiments.detection.models import dense
from cvlab.experiments.detection.models.dense import DenseHead, DenseOutputs
from cvlab.experiments.detection.models.detector import METADATA_KEY, DetectorMetadata
from cvlab.experiments.detection.models.yolov3_tiny import DARKNET_NAMES
from cvlab.models.nanodet import conv_act
from cvlab.ops import assignment, sampling
from cvlab.runs import weights_file

BUNDLED_WEIGHTS = common_weights.BUNDLED_WEIGHTS / "nanodet_coco.safetensors"

WIDTH = 128  # channels of the pyramid
NUM_BINS = 11  # of a distance: 0 to 10 strides
HINT = "install cvlab again"
PRIOR_PROBABILITY = 1e-2  # of a class that COCO does not have, at every point at the start


class NanoDet(DenseHead):
    """Class logits and distributions of distances at every cell of three feature maps.

    Args:
        channels: Channels C_k of the feature maps.
        num_classes: Number of classes.
    """

    focal_power = 2.0  # of the loss that its weights were trained with

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.lateral = nn.ModuleList(nn.Conv2d(count, WIDTH, 1) for count in channels)
        self.towers = nn.ModuleList(conv_act(WIDTH, WIDTH) for _ in channels)
        class_predictors = [nn.Conv2d(WIDTH, num_classes, 1) for _ in channels]
        self.distance_predictors = nn.ModuleList(nn.Conv2d(WIDTH, 4 * NUM_BINS, 1) for _ in channels)
        for predictor in class_predictors:
            assert predictor.bias is not None
            nn.init.normal_(predictor.weight, std=0.01)
            nn.init.constant_(predictor.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self.class_predictors = nn.ModuleList(class_predictors)

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the mixed maps (N, WIDTH, H_k, W_k) of feature maps (N, C_k, H_k, W_k)."""
        maps = [lateral(m) for lateral, m in zip(self.lateral, features, strict=True)]
        for k in range(len(maps) - 1, 0, -1):
            maps[k - 1] = maps[k - 1] + _resize(maps[k], maps[k - 1])
        for k in range(1, len(maps)):
            maps[k] = maps[k] + _resize(maps[k - 1], maps[k])
        return maps

    def forward(self, features: Sequence[Tensor]) -> DenseOutputs:
        """Predict from feature maps (N, C_k, S / stride_k, S / stride_k), highest resolution first."""
        maps = [tower(m) for tower, m in zip(self.towers, self.pyramid(features), strict=True)]
        points = assignment.grid_points([m.shape[2:] for m in maps], self.strides).to(features[0].device)
        levels = zip(maps, self.class_predictors, strict=True)
        logits = torch.cat([predictor(m).flatten(2) for m, predictor in levels], 2).mT.float()  # (N, P, C)
        levels = zip(maps, self.distance_predictors, strict=True)
        by_edge = torch.cat([predictor(m).flatten(2) for m, predictor in levels], 2).mT.float()
        distance_logits = by_edge.unflatten(2, (4, NUM_BINS))  # (N, P, 4, B)
        bins = torch.arange(NUM_BINS, dtype=torch.float32, device=logits.device)
        ltrb_px = distance_logits.softmax(-1) @ bins * points[:, 2:]
        return DenseOutputs(logits, dense.decode(points, ltrb_px), points, distance_logits)

    @torch.no_grad()
    def load_pretrained(self, classes: Sequence[str]) -> None:
        """Load the weights trained on COCO if this head is on their backbone.

        The predictors of classes that COCO does not have stay as they are.
        """
        metadata, tensors = weights_file.read(BUNDLED_WEIGHTS, METADATA_KEY, DetectorMetadata, "a detector", HINT)
        state = self.state_dict()
        if state["lateral.0.weight"].shape != tensors["lateral.0.weight"].shape:
            return
        coco = {name: k for k, name in enumerate(metadata.classes)}
        spelled = [DARKNET_NAMES.get(name.casefold(), name.casefold()) for name in classes]
        rows = {k: coco[name] for k, name in enumerate(spelled) if name in coco}
        for name, tensor in tensors.items():
            if not name.startswith("class_predictors."):
                state[name].copy_(tensor)
                continue
            for k, row in rows.items():
                state[name][k] = tensor[row]


def _resize(source: Tensor, target: Tensor) -> Tensor:
    height, width = target.shape[2:]
    return sampling.upsample_bilinear(source, (height, width))
