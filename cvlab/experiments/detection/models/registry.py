"""Detectors by name, on which maps of a backbone they stand, and their weights in a file that says what they are."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvlab import registry
from cvlab.config.schema import Registry
from cvlab.errors import ConfigError
from cvlab.experiments.detection.models.finetune import HINT, Tuned
from cvlab.models import pretrained
from cvlab.models.backbone import PROBE_PX, feature_layers
from cvlab.models.features import FeatureExtractor
from cvlab.runs import weights_file

DETECTORS = {
    "yolo_fpn": "cvlab.experiments.detection.models.yolo_fpn:YoloFpn",
    "faster_rcnn": "cvlab.experiments.detection.models.faster_rcnn:FasterRcnn",
    "faster_rcnn_course": "cvlab.experiments.detection.models.faster_rcnn_course:FasterRcnnCourse",
    "yolo_grid": "cvlab.experiments.detection.models.yolo_grid:YoloGrid",
}
TABLE = Registry("detector", DETECTORS, frozenset({"channels", "num_classes"}))
FILE = "detector.safetensors"  # of a training, in its run directory
KEY = "cvlab_detector"
LOAD_HINT = "give a run of `cvlab train` that trained a detector, or its detector.safetensors"


@dataclass(frozen=True)
class About:
    """What a detector is: enough to build it again."""

    model: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    size_px: int
    backbone: str = pretrained.DEFAULT_MODEL
    backbone_weights: str | None = None
    trained_on: str = ""
    is_tuned: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detector:
    """A detector with the backbone that it stands on.

    `all_features` are the maps that the head reads; `features` are those that `head` has to be given, which is the
    finest alone where it brings its own last layers of the backbone.
    """

    about: About
    all_features: FeatureExtractor
    features: FeatureExtractor
    head: nn.Module


class WithBackbone(nn.Module):
    """A detector with the backbone before it: takes pictures (N, 3, S, S) in [0, 1], gives its `outputs` by name."""

    def __init__(self, made: Detector) -> None:
        super().__init__()
        self.features, self.head, self.backbone = made.features, made.head, made.features.model.module
        plain = self.head.head if isinstance(self.head, Tuned) else self.head
        self.outputs: tuple[str, ...] = getattr(plain, "outputs", ())
        self.plain = plain

    def forward(self, images: torch.Tensor) -> Any:
        """Return what the head finds; in plain tensors, where it has them."""
        maps = self.features.batch(images, to_end=True)
        found = self.head([maps[name] for name in self.features.names])
        return self.plain.plain(found) if self.outputs else found  # type: ignore[operator]


def build(about: About, device: torch.device) -> Detector:
    """Build a detector, its head's weights drawn at random. ConfigError for a backbone that can't be tuned."""
    kind = registry.get("detector", about.model, DETECTORS)
    net = pretrained.build(about.backbone, about.backbone_weights, device)
    found = FeatureExtractor(net, feature_layers(net, kind.strides, getattr(kind, "is_last", False)))
    probe = torch.rand((1, 3, PROBE_PX, PROBE_PX), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        seen = found.batch(probe)
    maps = [seen[name] for name in found.names]
    head = kind(channels=[m.shape[1] for m in maps], num_classes=len(about.classes), **about.arguments)
    given = found
    if about.is_tuned:
        head = Tuned(head, net.module.model, found.names).to(device)
        _require_same(head, maps, about.backbone)
        given = FeatureExtractor(net, found.names[:1])
    return Detector(about, found, given, head.to(device, memory_format=torch.channels_last))


@torch.inference_mode()
def _require_same(tuned: Tuned, maps: list[torch.Tensor], backbone: str) -> None:
    """Require that the copied layers make of the finest map what the backbone makes."""
    try:
        made = tuned.maps(maps[0])
        is_same = all(torch.allclose(mine, theirs, 1e-3, 1e-3) for mine, theirs in zip(made, maps, strict=True))
    except (RuntimeError, TypeError, NotImplementedError):
        is_same = False
    if not is_same:
        raise ConfigError(f"{backbone}: its last layers can't be run on their own", HINT)


def has_two_stages(model: str) -> bool:
    """Whether a detector proposes regions before it looks at them."""
    return hasattr(registry.get("detector", model, DETECTORS), "regions_of")


def save(about: About, head: nn.Module, path: Path) -> None:
    """Write a head's weights, in float16, and what they are. RunDirError where the disk refuses."""
    weights_file.save(path, KEY, asdict(about), head)


def load(path: Path, device: torch.device) -> Detector:
    """Read a detector from a file of `save`. DataError says what is wrong with it."""
    about, tensors = weights_file.read(path, KEY, About, "a detector", LOAD_HINT)
    made = build(about, device)
    weights_file.fill(made.head, tensors, path, LOAD_HINT)
    return made
