"""A detection head together with the backbone's last stages, so that both are trained.

Only the layers after the highest-resolution feature map are trained. Their batch normalizations and depthwise filters
stay frozen, see `models.depthwise`.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.experiments.detection.models.base import DetectionHead, Targets, TwoStageHead
from cvlab.models.depthwise import freeze_depthwise
from cvlab.ops.average_precision import Detections

HINT = "finetune_epochs=0 leaves the backbone frozen"


class FineTunedDetector(TwoStageHead[Any]):
    """A head and trainable copies of the backbone's stages between its feature maps.

    Args:
        head: The detection head.
        backbone: The network whose layers are copied.
        layers: Names of the layers that give the feature maps, highest resolution first; those after `layers[0]` up to
            `layers[-1]` are copied. They must be siblings in one sequence.

    It is a two-stage detector if its head is one.
    """

    def __init__(self, head: DetectionHead[Any], backbone: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        if len(layers) < 2:
            raise ConfigError("this detector reads one map of the backbone: there is no later layer to train", HINT)
        self.head = head
        parent = layers[0].rpartition(".")[0]
        siblings = dict(backbone.get_submodule(parent).named_children())
        order = list(siblings)
        ends = [name.rpartition(".")[2] for name in layers]
        if any(
            name.rpartition(".")[0] != parent or end not in siblings for name, end in zip(layers, ends, strict=True)
        ):
            raise ConfigError(f"the layers {', '.join(layers)} of the backbone are not in one sequence", HINT)
        stops = [order.index(end) + 1 for end in ends]
        self.stages = nn.ModuleList(
            nn.Sequential(*(copy.deepcopy(siblings[name]) for name in order[start:stop]))
            for start, stop in itertools.pairwise(stops)
        )
        self.stages.requires_grad_(True)
        freeze_depthwise(self.stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> "FineTunedDetector":
        """Set the head's mode; the backbone's normalizations and dropouts always stay in evaluation mode."""
        super().train(mode)
        self.stages.eval()
        return self

    def feature_maps(self, finest: Tensor) -> list[Tensor]:
        """Compute all feature maps from the one of highest resolution (N, C, H, W)."""
        maps = [finest]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, features: Sequence[Tensor]) -> Any:
        """Return the head's outputs for the highest-resolution map alone, or for all maps if they are given."""
        return self.head(self.feature_maps(features[0]) if len(features) == 1 else features)

    def losses(self, outputs: Any, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return the head's losses."""
        return self.head.losses(outputs, targets, size_px)

    def postprocess(
        self, outputs: Any, size_px: int, score_threshold: float, nms_iou: float, max_detections: int
    ) -> list[Detections]:
        """Return the head's detections."""
        return self.head.postprocess(outputs, size_px, score_threshold, nms_iou, max_detections)

    def generate_proposals(self, outputs: Any) -> list[tuple[Tensor, Tensor]]:
        """Return the proposals of a two-stage head."""
        assert isinstance(self.head, TwoStageHead)
        return self.head.generate_proposals(outputs)
