"""A detector together with the last layers of its backbone, so that they learn with it.

The layers after the finest map make the coarser ones. Normalisations and depthwise filters stay as they were trained:
the latter hold few of the weights, and their gradient takes most of the time (5x5, bfloat16: 117 of 124 ms for 32 maps
of 672 x 20 x 20 on two cores).
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.experiments.detection.models.base import Targets
from cvlab.ops.average_precision import Detections

HINT = "tune_epochs=0 leaves the backbone alone"


class _InFloat32(nn.Module):
    """A layer outside of autocast."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.inner(x.float()).to(x.dtype)  # type: ignore[no-any-return]


def _fix_depthwise(layers: nn.Module) -> None:
    """Take depthwise filters out of what learns; strided ones run in float32, where their gradient is 30 times as fast.

    That holds for oneDNN's kernels on a CPU with bfloat16: 143 ms and 2.5 ms for 32 maps of 672 x 20 x 20.
    """
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and child.groups == child.in_channels > 1:
                child.requires_grad_(False)
                if max(child.stride) > 1:
                    setattr(module, name, _InFloat32(child))


class Tuned(nn.Module):
    """A detector's head and the layers of `net` from the one after `names[0]` to `names[-1]`, copied."""

    def __init__(self, head: nn.Module, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        if len(names) < 2:
            raise ConfigError("this detector stands on one map of the backbone: no layer comes after it", HINT)
        self.head = head
        parent = names[0].rpartition(".")[0]
        children = dict(net.get_submodule(parent).named_children())
        order = list(children)
        ends = [name.rpartition(".")[2] for name in names]
        if any(name.rpartition(".")[0] != parent or end not in children for name, end in zip(names, ends, strict=True)):
            raise ConfigError(f"the layers {', '.join(names)} of the backbone do not follow each other", HINT)
        places = [order.index(end) + 1 for end in ends]
        self.stages = nn.ModuleList(
            nn.Sequential(*(copy.deepcopy(children[name]) for name in order[start:end]))
            for start, end in itertools.pairwise(places)
        )
        self.stages.requires_grad_(True)
        _fix_depthwise(self.stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Tuned":
        """Train the head; the backbone's normalisations and dropouts always are as in evaluation."""
        super().train(mode)
        self.stages.eval()
        return self

    def maps(self, finest: Tensor) -> list[Tensor]:
        """Return all maps, of which the finest (N, C, H, W) is given."""
        made = [finest]
        for stage in self.stages:
            made.append(stage(made[-1]))
        return made

    def forward(self, maps: Sequence[Tensor]) -> Any:
        """Return what the head finds in the finest map alone, or in all of them, made elsewhere."""
        return self.head(self.maps(maps[0]) if len(maps) == 1 else maps)

    def losses(self, found: Any, targets: Targets, size_px: int) -> dict[str, Tensor]:
        """Return the head's losses."""
        losses: dict[str, Tensor] = self.head.losses(found, targets, size_px)  # type: ignore[operator]
        return losses

    def detections(self, found: Any, size_px: int, floor: float, iou: float, most: int) -> list[Detections]:
        """Return what the head finds in each picture."""
        results: list[Detections] = self.head.detections(found, size_px, floor, iou, most)  # type: ignore[operator]
        return results

    def regions_of(self, found: Any) -> list[tuple[Tensor, Tensor]]:
        """Return what the first stage of a head with two proposes, before and after suppression."""
        regions: list[tuple[Tensor, Tensor]] = self.head.regions_of(found)  # type: ignore[operator]
        return regions
