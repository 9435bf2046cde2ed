"""A detector: a head on a backbone, and its weights in a file with the metadata that rebuild it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvlab.errors import ConfigError
from cvlab.experiments.detection.models.base import DetectionHead
from cvlab.experiments.detection.models.finetune import HINT, FineTunedDetector
from cvlab.experiments.detection.models.registry import head_class
from cvlab.models import names, pretrained
from cvlab.models.backbone import PROBE_PX, feature_layers
from cvlab.models.features import FeatureExtractor
from cvlab.runs import weights_file

METADATA_KEY = "cvlab_detector"
LOAD_HINT = "give a run of `cvlab train` that trained a detector, or its detector.safetensors"


@dataclass(frozen=True)
class DetectorMetadata:
    """What a weights file says about its detector: enough to build it again."""

    model: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    size_px: int
    backbone: str = names.DEFAULT_MODEL
    backbone_weights: str | None = None
    trained_on: str = ""
    is_finetuned: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detector:
    """A detection head and the backbone that computes its features.

    `all_features` extracts every feature map that the head reads. `features` extracts those that `head` has to be
    given: only the highest-resolution one if the head is fine-tuned with copies of the backbone's later stages.
    """

    metadata: DetectorMetadata
    all_features: FeatureExtractor
    features: FeatureExtractor
    head: DetectionHead[Any]

    @property
    def base_head(self) -> DetectionHead[Any]:
        """The head itself, without fine-tuned backbone stages around it."""
        return self.head.head if isinstance(self.head, FineTunedDetector) else self.head


class DetectorGraph(nn.Module):
    """Backbone and head as one module: images (N, 3, S, S) in [0, 1] to `output_names`, as exports need it."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.features, self.head, self.backbone = detector.features, detector.head, detector.features.model.module
        self.base_head = detector.base_head
        self.output_names = self.base_head.output_names

    def forward(self, images: torch.Tensor) -> Any:
        """Return the head's outputs, as plain tensors if it has such."""
        maps = self.features.batch(images)
        outputs = self.head([maps[name] for name in self.features.names])
        return self.base_head.export_outputs(outputs) if self.output_names else outputs


def build(metadata: DetectorMetadata, device: torch.device) -> Detector:
    """Build a detector with a randomly initialized head. ConfigError for a backbone that cannot be fine-tuned."""
    cls = head_class(metadata.model)
    backbone = pretrained.build(metadata.backbone, metadata.backbone_weights, device)
    all_features = FeatureExtractor(backbone, feature_layers(backbone, cls.strides, cls.uses_last_layer))
    probe = torch.rand((1, 3, PROBE_PX, PROBE_PX), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        by_name = all_features.batch(probe)
    maps = [by_name[name] for name in all_features.names]
    head = cls(channels=[m.shape[1] for m in maps], num_classes=len(metadata.classes), **metadata.arguments)
    features = all_features
    if metadata.is_finetuned:
        head = FineTunedDetector(head, backbone.module.model, all_features.names).to(device)
        _check_stages(head, maps, metadata.backbone)
        features = FeatureExtractor(backbone, all_features.names[:1])
    head = head.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Detector(metadata, all_features, features, head)


@torch.inference_mode()
def _check_stages(detector: FineTunedDetector, maps: list[torch.Tensor], backbone: str) -> None:
    """Check that the copied stages compute the same feature maps as the backbone."""
    try:
        copied = detector.feature_maps(maps[0])
        is_same = all(torch.allclose(mine, expected, 1e-3, 1e-3) for mine, expected in zip(copied, maps, strict=True))
    except (RuntimeError, TypeError, NotImplementedError):
        is_same = False
    if not is_same:
        raise ConfigError(f"{backbone}: its last layers cannot be run on their own", HINT)


def save(metadata: DetectorMetadata, head: nn.Module, path: Path) -> None:
    """Write a head's weights, in float16, with their metadata. RunDirError if the file cannot be written."""
    weights_file.save(path, METADATA_KEY, asdict(metadata), head)


def load(path: Path, device: torch.device) -> Detector:
    """Load a detector from a file written by `save`. DataError says what is wrong with it."""
    metadata, tensors = weights_file.read(path, METADATA_KEY, DetectorMetadata, "a detector", LOAD_HINT)
    detector = build(metadata, device)
    weights_file.load_weights(detector.head, tensors, path, LOAD_HINT)
    return detector
