"""Build, save and load captioners: the model, the backbone whose features it takes, and its vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cvlab import registry
from cvlab.data.vocabulary import Vocabulary
from cvlab.experiments.captioning.base import CaptionModel
from cvlab.experiments.captioning.config import CAPTIONERS
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


@dataclass(frozen=True)
class LoadedCaptioner:
    """A captioner with the feature extractor and the vocabulary that it needs."""

    metadata: CaptionerMetadata
    feature_extractor: FeatureExtractor
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


def build(metadata: CaptionerMetadata, feature_extractor: FeatureExtractor, device: torch.device) -> LoadedCaptioner:
    """Build a captioner with random weights on top of a feature extractor."""
    vocabulary = Vocabulary(metadata.vocabulary)
    with torch.inference_mode():
        probe = torch.full((1, 3, models_backbone.PROBE_PX, models_backbone.PROBE_PX), 0.5, device=device)
        in_channels = sum(features.shape[1] for features in feature_extractor.batch(probe).values())
    builder: Callable[..., CaptionModel] = registry.get("captioner", metadata.model, CAPTIONERS)
    model = builder(in_channels=in_channels, vocab_size=len(vocabulary), **metadata.arguments)
    return LoadedCaptioner(metadata, feature_extractor, vocabulary, model.to(device))


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
    feature_extractor = build_feature_extractor(metadata.strides, metadata.backbone, metadata.backbone_weights, device)
    captioner = build(metadata, feature_extractor, device)
    weights_file.load_weights(captioner.model, tensors, path, LOAD_HINT)
    return captioner
