"""Detectors by name, on which maps of a backbone they stand, and their weights in a file that says what they are."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvlab import durable, lookup
from cvlab.errors import ConfigError, DataError
from cvlab.models import features, pretrained
from cvlab.models.features import Features
from cvlab.models.pretrained import Pretrained
from cvlab.schema import Table

DETECTORS = {
    "yolo_fpn": "cvlab.models.yolo_fpn:YoloFpn",
    "faster_rcnn": "cvlab.models.faster_rcnn:FasterRcnn",
    "yolo_grid": "cvlab.models.yolo_grid:YoloGrid",
}
TABLE = Table("detector", DETECTORS, frozenset({"channels", "num_classes"}))
LEVELS = {pretrained.DEFAULT: {8: "blocks.2", 16: "blocks.4", 32: "blocks.6"}}  # the last layer of each stride
LAST = {pretrained.DEFAULT: "bn2"}  # 1280 channels at stride 32, as the course's MobileNetV2 has them
PROBE_PX = 64
FILE = "detector.safetensors"  # of a training, in its run directory


def levels(net: Pretrained, strides: Sequence[int], is_last: bool = False) -> list[str]:
    """Return the names of the backbone's layers of some strides. ConfigError where it has none such."""
    if is_last and net.name in LAST:
        return [LAST[net.name]]
    known = LEVELS.get(net.name) or features.last_by_stride(net)
    missing = [stride for stride in strides if stride not in known]
    if missing:
        raise ConfigError(f"{net.name} has no maps of stride {missing[0]}", f"known: {', '.join(map(str, known))}")
    return [known[stride] for stride in strides]


@dataclass(frozen=True)
class About:
    """What a detector is: enough to build it again."""

    model: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    size_px: int
    backbone: str = pretrained.DEFAULT
    backbone_weights: str | None = None
    trained_on: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detector:
    """A detector with the backbone that it stands on."""

    about: About
    features: Features
    head: nn.Module


def build(about: About, device: torch.device) -> Detector:
    """Build a detector, its head's weights drawn at random."""
    kind = lookup.find("detector", about.model, DETECTORS)
    net = pretrained.build(about.backbone, about.backbone_weights, device)
    found = Features(net, levels(net, kind.strides, getattr(kind, "is_last", False)))
    with torch.inference_mode():
        maps = found.batch(torch.full((1, 3, PROBE_PX, PROBE_PX), 0.5, device=device))
    channels = [maps[name].shape[1] for name in found.names]
    head = kind(channels=channels, num_classes=len(about.classes), **about.arguments)
    return Detector(about, found, head.to(device, memory_format=torch.channels_last))


def save(about: About, head: nn.Module, path: Path) -> None:
    """Write a head's weights, in float16, and what they are. RunDirError where the disk refuses."""
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    halves = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}
    raw = to_bytes(halves, {"cvlab_detector": json.dumps(asdict(about), ensure_ascii=True)})
    durable.write(path, lambda file: file.write(raw))


def load(path: Path, device: torch.device) -> Detector:
    """Read a detector from a file of `save`. DataError says what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    hint = "give a run of `cvlab train` that trained a detector, or its detector.safetensors"
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint)
    try:
        with safe_open(path, "pt") as file:
            raw = (file.metadata() or {}).get("cvlab_detector")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        told = json.loads(raw) if raw else None
        about = About(**told | {"classes": tuple(told["classes"])}) if told else None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a detector that can be read: {error}", hint) from error
    if about is None:
        raise DataError(f"{path}: does not say what it is", hint)
    made = build(about, device)
    own = made.head.state_dict()
    wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    if wrong or tensors.keys() != own.keys():
        raise DataError(f"{path}: its weights do not fit {about.model}: {(wrong or sorted(tensors))[0]}", hint)
    made.head.load_state_dict(tensors)
    made.head.eval().requires_grad_(False)
    return made
