"""What the images of class visualization maximize: the logits of classes, or the activations of a layer's channels."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cvlab.data import photo_paths, photos
from cvlab.errors import ConfigError
from cvlab.experiments.interpretability import deep_dream
from cvlab.experiments.interpretability.config import ClassVisualizationConfig, split_channels
from cvlab.models.features import FeatureExtractor
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import visualize
from cvlab.runs.results import Row
from cvlab.storage.file_names import file_stem

CHANNEL_UNIT = 0.03  # of a layer's standard deviation; one of it counts in the loss as much as one of a logit


class Targets(Protocol):
    """What N images maximize.

    Attributes:
        names: Unique names (N,) for files.
        titles: What people read, (N,).
        groups: Numbers (N,), the same for the images of one target.
    """

    names: list[str]
    titles: list[str]
    groups: list[int]

    def scores(self, images: Tensor) -> Tensor:
        """Return what is maximized, (N,), of images (N, 3, S, S) in [0, 1]."""

    def describe(self, images: Tensor) -> list[Row]:
        """Return the values of the results for the saved images (N, 3, S, S)."""


def _numbered(names: Sequence[str], times: int, separator: str) -> list[str]:
    """Return each name `times` times, with a number if that is more than once."""
    return [f"{name}{separator}{k + 1}" if times > 1 else name for name in names for k in range(times)]


class ClassTargets:
    """The logits of classes, several images for each."""

    def __init__(self, model: PretrainedClassifier, classes: Sequence[int], times: int, device: torch.device) -> None:
        self.model = model
        self.names = _numbered([f"{index}-{file_stem(model.classes[index])}" for index in classes], times, "-")
        self.titles = _numbered([model.classes[index] for index in classes], times, ", ")
        self.groups = [k for k in range(len(classes)) for _ in range(times)]
        self.classes = torch.tensor([classes[k] for k in self.groups], device=device)

    def scores(self, images: Tensor) -> Tensor:
        """Return the logit of each image's class."""
        logits = self.model.module(images.contiguous(memory_format=torch.channels_last)).float()
        of_classes: Tensor = logits.gather(1, self.classes[:, None])[:, 0]
        return of_classes

    def describe(self, images: Tensor) -> list[Row]:
        """Return the predicted class of each image, its target and the target's probability."""
        rows = []
        for p, index in zip(self.model.probabilities(images).cpu(), self.classes.tolist(), strict=True):
            predicted = self.model.class_score(int(p.argmax()), float(p.max()))
            rows.append({**predicted, "target": self.model.classes[index], "score_target": float(p[index])})
        return rows


class ChannelTargets:
    """The mean activations of channels of a layer, several images for each; what lies behind it is not computed.

    Scores are in units of the standard deviation of the layer's activations for the bundled photo.
    """

    def __init__(self, model: PretrainedClassifier, text: str, times: int, device: torch.device) -> None:
        """Take the channels that a text names, as `split_channels` has it; ConfigError if one does not exist."""
        self.layer, channels = split_channels(text)
        self.extractor = FeatureExtractor(model, [self.layer])
        photo = photos.to_tensor(model.transform(photos.load(photo_paths.find_images([photo_paths.SAMPLE])[0])))
        with torch.inference_mode():
            maps = self.extractor.batch(photo[None].to(device))[self.layer].float()
        if max(channels) >= maps.shape[1]:
            raise ConfigError(
                f"layer {self.layer!r} has no channel {max(channels)}", f"its channels are 0 to {maps.shape[1] - 1}"
            )
        self.unit = max(float(maps.std()), 1e-12)
        stem = file_stem(self.layer)
        self.names = _numbered([f"{stem}-{channel}" for channel in channels], times, "-")
        self.titles = _numbered([f"{self.layer}:{channel}" for channel in channels], times, ", ")
        self.groups = [k for k in range(len(channels)) for _ in range(times)]
        self.channels = torch.tensor([channels[k] for k in self.groups], device=device)

    def scores(self, images: Tensor) -> Tensor:
        """Return the mean activation of each image's channel, in the unit of the loss."""
        return self._responses(images) / CHANNEL_UNIT

    def _responses(self, images: Tensor) -> Tensor:
        maps = self.extractor.batch(images)[self.layer].float()
        of_channels: Tensor = maps[torch.arange(len(maps), device=maps.device), self.channels]  # (N, h, w)
        return of_channels.mean((1, 2)) / self.unit

    def describe(self, images: Tensor) -> list[Row]:
        """Return the channel and its mean activation, in standard deviations of the layer."""
        with torch.inference_mode():
            responses = self._responses(images).cpu().tolist()
        return [
            {"channel": f"{self.layer}:{channel}", "response": response}
            for channel, response in zip(self.channels.tolist(), responses, strict=True)
        ]


def build_targets(config: ClassVisualizationConfig, model: PretrainedClassifier, device: torch.device) -> Targets:
    """Return what a configuration names. Raises ConfigError if the model has no such class, layer or channel."""
    if config.channel is not None:
        return ChannelTargets(model, config.channel, config.diversity, device)
    return ClassTargets(model, [model.class_index(name) for name in config.targets], config.diversity, device)


class Similarity:
    """How similar the images of one target are: the cosine of their Gram matrices at a layer (Olah et al., 2017)."""

    def __init__(self, config: ClassVisualizationConfig, model: PretrainedClassifier, groups: Sequence[int]) -> None:
        layer = split_channels(config.channel)[0] if config.channel else deep_dream.default_layer(model)
        self.layer, self.extractor = layer, FeatureExtractor(model, [layer])
        pairs = [(i, j) for i in range(len(groups)) for j in range(i) if groups[i] == groups[j]]
        self.first, self.second = (torch.tensor(side) for side in zip(*pairs, strict=True))

    def __call__(self, images: Tensor) -> Tensor:
        """Return the similarity in [0, 1] of each pair of images of one target: (P,)."""
        return visualize.gram_similarity(self.extractor.batch(images)[self.layer].float(), self.first, self.second)
