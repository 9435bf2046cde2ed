"""Which words a caption must and must not have, from what a detector and the backbone's classifier see in the photo.

References:
    Anderson et al., 2017, "Guided open vocabulary image captioning with constrained beam search".

Differences from the paper:
    The words of a concept are a table, not WordNet's; there are none outside of the captioner's vocabulary. A detector
    and a classifier confirm each other. Words of other animals and vehicles can be forbidden too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cvlab import registry
from cvlab.data import imagenet
from cvlab.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError
from cvlab.experiments.base import DetectsObjects
from cvlab.experiments.captioning.checkpoint import LoadedCaptioner
from cvlab.experiments.captioning.concepts import CONCEPTS, Concept
from cvlab.experiments.captioning.decoding import WordConstraints
from cvlab.models import backbone
from cvlab.models.photo_module import PhotoModule

MAX_REQUIRED = 2  # concepts of a caption: the beam search has 2 ** MAX_REQUIRED states
DETECTOR = "everyday"
MIN_SCORE = 0.6  # of a detected object
MAX_CONTRADICTION = 0.3  # probability of the other concepts of its group, with which it is still required
MIN_PROBABILITY = 0.7  # of the classes together of a concept that the detector has no class for
MIN_CONFIRMED_PROBABILITY, CONFIRMING_SCORE = 0.5, 0.2  # both at least
MIN_UNCONFIRMED_PROBABILITY = 0.9  # with a lower score
MAX_EXCLUDED_SCORE = 0.2
MAX_EXCLUDED_PROBABILITY = 0.1  # while another concept of the group is required
MAX_ABSENT_PROBABILITY = 0.01  # while none is


@dataclass(frozen=True)
class Evidence:
    """What is seen of a concept in a photo.

    Attributes:
        concept: The concept.
        score: The highest score of a detected object of sufficient area, in [0, 1].
        probability: The sum of the classifier's probabilities of its classes, in [0, 1].
    """

    concept: Concept
    score: float
    probability: float

    @property
    def strength(self) -> float:
        """The larger one of both."""
        return max(self.score, self.probability)

    @property
    def is_classified(self) -> bool:
        """Whether the classifier sees it, confirmed by the detector if that has such a class."""
        if self.concept.min_area is None:
            return self.probability >= MIN_PROBABILITY
        is_confirmed = self.score >= CONFIRMING_SCORE
        return self.probability >= (MIN_CONFIRMED_PROBABILITY if is_confirmed else MIN_UNCONFIRMED_PROBABILITY)


@dataclass(frozen=True)
class Guide:
    """What the caption of a photo must name, the highest-scoring first, and what it must not name."""

    required: tuple[Evidence, ...]
    excluded: tuple[Concept, ...]

    def as_row(self) -> list[dict[str, Any]]:
        """Return what must be named: a `label`, the detector's `score` and the classifier's `probability` each."""
        return [
            {"label": each.concept.name, "score": each.score, "probability": each.probability} for each in self.required
        ]


class Observer:
    """Says what captions of photos must name.

    Args:
        detector: The detector, with a score threshold of `MAX_EXCLUDED_SCORE` or less.
        classifier: Maps a feature map (N, C, H, W) to the logits (N, 1000) of ImageNet.
    """

    def __init__(self, detector: PhotoModule, classifier: Callable[[Tensor], Tensor]) -> None:
        self.detector, self.classifier = detector, classifier

    @torch.inference_mode()
    def guides(self, images: Sequence[Image.Image], feature_map: Tensor) -> list[Guide]:
        """Return a guide for each of N photos, given the map (N, C, H, W) of the backbone's last layer."""
        probabilities = self.classifier(feature_map).softmax(1).tolist()
        return [
            make_guide(collect_evidence(row["objects"], image.width * image.height, of_photo))
            for image, row, of_photo in zip(images, self.detector.predict(images), probabilities, strict=True)
        ]


def load_observer(captioner: LoadedCaptioner, ctx: ComputeContext) -> Observer:
    """Load the detector, and take the classifier on top of a captioner's first backbone.

    Raises:
        ConfigError: That backbone's last feature map is not among the captioner's features, or its classes are others.
    """
    first = captioner.feature_sources[0].extractor
    network: Any = first.model.module.model
    is_last = first.names[0] == backbone.LAST_LAYER.get(first.model.name)
    if not is_last or first.model.classes != imagenet.labels():
        raise ConfigError(
            "guide: this captioner's features are not those of a classifier of ImageNet",
            f"leave guide out, or use a captioner with backbone {' or '.join(backbone.LAST_LAYER)} and strides [32]",
        )
    detect: Any = registry.get_experiment("detect")
    assert isinstance(detect, DetectsObjects)
    detector = detect.bundled_detector(DETECTOR, ctx, MAX_EXCLUDED_SCORE)
    return Observer(detector, lambda feature_map: network.classifier(network.global_pool(feature_map)))


def collect_evidence(
    objects: Iterable[Mapping[str, Any]], area: float, probabilities: Sequence[float]
) -> list[Evidence]:
    """Return what is seen of every concept.

    Args:
        objects: Detected objects, each with `label`, `score` and `box_xyxy` in pixels.
        area: Area of the photo in square pixels.
        probabilities: Those of the 1000 classes of ImageNet.
    """
    scores: dict[str, float] = {}
    min_areas = {concept.name: concept.min_area for concept in CONCEPTS}
    for each in objects:
        left, top, right, bottom = each["box_xyxy"]
        min_area = min_areas.get(each["label"])
        if min_area is not None and (right - left) * (bottom - top) >= min_area * area:
            scores[each["label"]] = max(scores.get(each["label"], 0.0), each["score"])
    return [
        Evidence(
            concept,
            scores.get(concept.name, 0.0),
            sum(probabilities[k] for k in concept.imagenet),
        )
        for concept in CONCEPTS
    ]


def make_guide(evidence: Sequence[Evidence]) -> Guide:
    """Decide what a caption must name and must not name."""
    of_group: dict[str, float] = {}
    for each in evidence:
        of_group[each.concept.group] = of_group.get(each.concept.group, 0.0) + each.probability

    def is_required(each: Evidence) -> bool:
        others = of_group[each.concept.group] - each.probability if each.concept.group else 0.0
        is_detected = each.score >= MIN_SCORE and others < MAX_CONTRADICTION
        return is_detected or each.is_classified

    required = sorted(filter(is_required, evidence), key=lambda each: -each.strength)
    groups = {each.concept.group: each for each in required if each.concept.group}

    def is_excluded(each: Evidence) -> bool:
        if not each.concept.group or each in required:
            return False
        other = groups.get(each.concept.group)
        if other is not None and other.is_classified:
            return each.probability < MAX_EXCLUDED_PROBABILITY
        max_probability = MAX_ABSENT_PROBABILITY if other is None else MAX_EXCLUDED_PROBABILITY
        return each.score < MAX_EXCLUDED_SCORE and each.probability < max_probability

    excluded = tuple(each.concept for each in evidence if is_excluded(each))
    return Guide(tuple(required[:MAX_REQUIRED]), excluded)


def word_constraints(
    guides: Sequence[Guide], vocabulary: Vocabulary, max_length: int, device: torch.device
) -> WordConstraints:
    """Return the constraints of N captions; a concept without a word in the vocabulary requires nothing.

    Args:
        guides: One for each photo.
        vocabulary: The captioner's vocabulary.
        max_length: Maximum number of tokens of a caption, END included; not all concepts may fit.
        device: Where to put them.
    """
    num_sets = min(MAX_REQUIRED, max_length - 1)
    required = torch.zeros(len(guides), num_sets, len(vocabulary), dtype=torch.bool)
    forbidden = torch.zeros(len(guides), len(vocabulary), dtype=torch.bool)
    ids = vocabulary.token_to_id

    def token_ids(concept: Concept) -> list[int]:
        return [ids[word] for word in concept.synonyms if word in ids]

    for k, guide in enumerate(guides):
        excluded = set(guide.excluded)
        for concept in excluded:
            forbidden[k, token_ids(concept)] = True
        for concept in CONCEPTS:  # a word of something else stays allowed
            if concept not in excluded:
                forbidden[k, token_ids(concept)] = False
        for c, each in enumerate(guide.required[:num_sets]):
            required[k, c, token_ids(each.concept)] = True
    assert not forbidden[:, : len(SPECIAL_TOKENS)].any()
    return WordConstraints(required.to(device), forbidden.to(device))
