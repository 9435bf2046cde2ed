"""Build, save and load captioners: the model, the backbone whose features it takes, and its vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cvlab import registry
from cvlab.data.vocabulary import Vocabulary
from cvlab.experiments.captioning.base import CaptionModel
from cvlab.experiments.captioning.config import CAPTIONERS, ExtraFeaturesConfig
from cvlab.experiments.captioning.feature_store import FeatureSource
from cvlab.models import backbone as models_backbone
from cvlab.models import names, pretrained
from cvlab.models.features import FeatureExtractor
from cvlab.runs import weights_file

METADATA_KEY = "cvlab_captioner"
LOAD_HINT = "give a run of `cvlab train` that trained a captioner, or its captioner.safetensors"


@dataclass(frozen=True)
class CaptionerMetadata:
    """What is needed to rebuild a captioner; stored as JSON in the header of its weights file.

    Attributes:
        arguments: Keyword arguments of the model's class, without `in_channels` and `vocab_size`.
        vocabulary: The tokens of the vocabulary, special ones excluded.
        size_px: Photos are resized to squares of this size.
        max_length: Maximum number of tokens of a caption, START and END included.
        strides: Strides of the backbone's feature maps; the first one defines the spatial positions.
        backbone: Name of the pretrained classifier.
        backbone_weights: File of the backbone's weights; None for the default ones.
        model: Name of the model in `CAPTIONERS`.
        trained_on: Names of the data sets.
        notes: Anything else worth recording.
        extra_features: Keys of `ExtraFeaturesConfig` for each further backbone.
    """

    arguments: dict[str, Any]
    vocabulary: tuple[str, ...]
    size_px: int
    max_length: int
    strides: tuple[int, ...] = (32,)
    backbone: str = names.DEFAULT_MODEL
    backbone_weights: str | None = None
    model: str = "captioner"
    trained_on: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    extra_features: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class LoadedCaptioner:
    """A captioner with the backbones and the vocabulary that it needs."""

    metadata: CaptionerMetadata
    feature_sources: tuple[FeatureSource, ...]
    vocabulary: Vocabulary
    model: CaptionModel


def build_feature_extractor(
    strides: Sequence[int], backbone: str, weights: str | None, device: torch.device
) -> FeatureExtractor:
    """Build the extractor of a backbone's feature maps.

    Args:
        strides: Strides of the maps; for 32 alone, the output of the backbone's last layer.
        backbone: Name of the pretrained classifier.
        weights: File of its weights; None for the default ones.
        device: Where it runs.

    Raises:
        ConfigError: The backbone has no feature map of one of the strides.
    """
    classifier = pretrained.build(backbone, weights, device)
    layers = models_backbone.feature_layers(classifier, strides, is_last=tuple(strides) == (32,))
    return FeatureExtractor(classifier, layers)


def build_feature_sources(metadata: CaptionerMetadata, device: torch.device) -> tuple[FeatureSource, ...]:
    """Build the backbones that a captioner takes features from.

    Raises:
        ConfigError: A backbone has no feature map of one of the strides.
    """
    blocks = (
        ExtraFeaturesConfig(
            backbone=metadata.backbone,
            backbone_weights=metadata.backbone_weights,
            strides=metadata.strides,
            size=metadata.size_px,
        ),
        # JSON has no tuples
        *(ExtraFeaturesConfig(**block | {"strides": tuple(block["strides"])}) for block in metadata.extra_features),
    )
    return tuple(
        FeatureSource(
            build_feature_extractor(block.strides, block.backbone, block.backbone_weights, device), block.size
        )
        for block in blocks
    )


def build(
    metadata: CaptionerMetadata, feature_sources: tuple[FeatureSource, ...], device: torch.device
) -> LoadedCaptioner:
    """Build a captioner with random weights on top of its backbones."""
    vocabulary = Vocabulary(metadata.vocabulary)
    with torch.inference_mode():
        probe = torch.full((1, 3, models_backbone.PROBE_PX, models_backbone.PROBE_PX), 0.5, device=device)
        maps = [m for source in feature_sources for m in source.extractor.batch(probe).values()]
        in_channels = sum(feature_map.shape[1] for feature_map in maps)
    builder: Callable[..., CaptionModel] = registry.get("captioner", metadata.model, CAPTIONERS)
    model = builder(in_channels=in_channels, vocab_size=len(vocabulary), **metadata.arguments)
    return LoadedCaptioner(metadata, feature_sources, vocabulary, model.to(device))


def save(metadata: CaptionerMetadata, model: CaptionModel, path: Path) -> None:
    """Write a captioner's weights, as float16, and its metadata.

    Raises:
        RunDirError: The file cannot be written.
    """
    weights_file.save(path, METADATA_KEY, asdict(metadata), model)


def load(path: Path, device: torch.device) -> LoadedCaptioner:
    """Load a captioner, in evaluation mode, from a file written by `save`.

    Raises:
        DataError: The file is missing, damaged or not a captioner.
    """
    metadata, tensors = weights_file.read(path, METADATA_KEY, CaptionerMetadata, "a captioner", LOAD_HINT)
    captioner = build(metadata, build_feature_sources(metadata, device), device)
    weights_file.load_weights(captioner.model, tensors, path, LOAD_HINT)
    return captioner
