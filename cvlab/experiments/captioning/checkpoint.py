"""Captioners with the backbone that they stand on and their vocabulary, and their weights in a file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cvlab.config.schema import Registry
from cvlab.data.vocabulary import Vocabulary
from cvlab.experiments.captioning.model import Captioner
from cvlab.models import backbone as models_backbone
from cvlab.models import pretrained
from cvlab.models.features import FeatureExtractor
from cvlab.runs import weights_file

TABLE = Registry(
    "captioner", {"captioner": "cvlab.experiments.captioning.model:Captioner"}, frozenset({"channels", "num_words"})
)
FILE = "captioner.safetensors"  # of a training, in its run directory
KEY = "cvlab_captioner"
LOAD_HINT = "give a run of `cvlab train` that trained a captioner, or its captioner.safetensors"


@dataclass(frozen=True)
class About:
    """What a captioner is: enough to build it again."""

    arguments: dict[str, Any]
    words: tuple[str, ...]
    size_px: int
    length: int
    strides: tuple[int, ...] = (32,)
    backbone: str = pretrained.DEFAULT_MODEL
    backbone_weights: str | None = None
    trained_on: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A captioner, the layer of the backbone that it reads, and its vocabulary."""

    about: About
    features: FeatureExtractor
    vocabulary: Vocabulary
    net: Captioner


def maps_of(strides: Sequence[int], backbone: str, weights: str | None, device: torch.device) -> FeatureExtractor:
    """Return a backbone's maps of some strides, for 32 alone the last one. ConfigError where it has none such."""
    net = pretrained.build(backbone, weights, device)
    return FeatureExtractor(net, models_backbone.feature_layers(net, strides, is_last=tuple(strides) == (32,)))


def build(about: About, features: FeatureExtractor, device: torch.device) -> Made:
    """Build a captioner on a backbone's map, its weights drawn at random."""
    vocabulary = Vocabulary(about.words)
    with torch.inference_mode():
        probe = torch.full((1, 3, models_backbone.PROBE_PX, models_backbone.PROBE_PX), 0.5, device=device)
        channels = sum(found.shape[1] for found in features.batch(probe).values())
    net = Captioner(channels=channels, num_words=len(vocabulary), **about.arguments)
    return Made(about, features, vocabulary, net.to(device))


def save(about: About, net: Captioner, path: Path) -> None:
    """Write a captioner's weights, in float16, and what they are. RunDirError where the disk refuses."""
    weights_file.save(path, KEY, asdict(about), net)


def load(path: Path, device: torch.device) -> Made:
    """Read a captioner from a file of `save`. DataError says what is wrong with it."""
    about, tensors = weights_file.read(path, KEY, About, "a captioner", LOAD_HINT)
    made = build(about, maps_of(about.strides, about.backbone, about.backbone_weights, device), device)
    weights_file.fill(made.net, tensors, path, LOAD_HINT)
    return made
