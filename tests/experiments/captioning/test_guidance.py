"""Guidance, the words a caption must or must not contain: the table of concepts, the rules, their effect."""

import json

import pytest
import torch
from PIL import Image

from cvlab import registry
from cvlab.data import imagenet
from cvlab.data.vocabulary import Vocabulary
from cvlab.experiments.captioning import guidance
from cvlab.experiments.captioning.concepts import CONCEPTS
from cvlab.experiments.captioning.config import CaptionConfig
from cvlab.experiments.captioning.guidance import Evidence
from cvlab.experiments.captioning.predict import load_predictor

BY_NAME = {concept.name: concept for concept in CONCEPTS}


@pytest.fixture(scope="module")
def predictor():
    return load_predictor(CaptionConfig(experiment="caption", name="caption", precision="float32"))


def evidence(**values):
    """Return evidence for all concepts; `cat=(0.7, 0.9)` is a score and a probability."""
    return [Evidence(concept, *values.get(concept.name, (0.0, 0.0))) for concept in CONCEPTS]


def required_names(guide):
    return [item.concept.name for item in guide.required]


def test_concepts_are_in_the_vocabulary_and_have_disjoint_classes(predictor):
    tokens = set(predictor.captioner.vocabulary.tokens)
    not_in_vocabulary = {concept.name for concept in CONCEPTS if not tokens & set(concept.synonyms)}
    assert not_in_vocabulary <= {"zebra"}
    indices = [index for concept in CONCEPTS for index in concept.imagenet]
    assert len(set(indices)) == len(indices) == len([index for index in indices if 0 <= index < 1000])
    labels = imagenet.labels()
    assert {labels[k] for k in BY_NAME["cat"].imagenet} >= {"tabby", "Egyptian cat"}
    dogs = BY_NAME["dog"].imagenet
    assert (labels[dogs[0]], labels[dogs[-1]]) == ("Chihuahua", "Mexican hairless")
    detectable = {concept.name for concept in CONCEPTS if concept.min_area is not None}
    assert detectable <= set(predictor.observer.detector.classes)


@pytest.mark.parametrize(
    ("values", "required", "excluded"),
    [
        ({}, [], {"dog", "cat", "bus"}),
        ({"cat": (0.65, 0.02), "dog": (0.1, 0.05)}, ["cat"], {"dog"}),
        ({"cat": (0.65, 0.02), "dog": (0.3, 0.05)}, ["cat"], set()),  # the detector also sees a dog
        ({"horse": (0.65, 0.0), "dog": (0.3, 0.9)}, ["dog"], {"horse"}),  # the classifier contradicts
        ({"dog": (0.1, 0.8)}, [], set()),  # the detector does not confirm it
        ({"dog": (0.2, 0.5)}, ["dog"], {"cat"}),
        ({"monkey": (0.0, 0.7), "dog": (0.5, 0.05)}, ["monkey"], {"dog"}),  # no monkeys in COCO
        ({"person": (0.7, 0.0), "cat": (0.8, 0.9), "pizza": (0.65, 0.0)}, ["cat", "person"], {"dog"}),
    ],
)
def test_required_and_excluded_concepts(values, required, excluded):
    guide = guidance.make_guide(evidence(**values))
    assert required_names(guide) == required
    excluded_names = {concept.name for concept in guide.excluded}
    assert excluded <= excluded_names
    assert not excluded_names & (set(values) - excluded)
    assert "person" not in excluded_names


def test_small_boxes_do_not_count_and_probabilities_add_up():
    probabilities = [0.0] * 1000
    probabilities[281], probabilities[285] = 0.25, 0.5
    objects = [
        {"label": "bus", "score": 0.9, "box_xyxy": [0, 0, 20, 20]},  # 4 % of the photo
        {"label": "cat", "score": 0.3, "box_xyxy": [0, 0, 50, 50]},
        {"label": "cat", "score": 0.4, "box_xyxy": [0, 0, 50, 50]},
        {"label": "fork", "score": 0.9, "box_xyxy": [0, 0, 50, 50]},
    ]
    evidence_by_name = {item.concept.name: item for item in guidance.collect_evidence(objects, 10_000, probabilities)}
    assert (evidence_by_name["cat"].score, evidence_by_name["cat"].probability) == (0.4, 0.75)
    assert evidence_by_name["bus"].strength == 0


def test_ambiguous_words_stay_allowed_and_words_outside_the_vocabulary_are_not_required():
    vocabulary = Vocabulary(("a", "cat", "bike", "bicycle", "motorcycle"))
    ids = vocabulary.token_to_id
    guide = guidance.make_guide(evidence(bicycle=(0.9, 0.0), zebra=(0.9, 0.0)))
    constraints = guidance.word_constraints([guide], vocabulary, 10, torch.device("cpu"))
    required_words = {tuple(k for k in vocabulary.tokens if row[ids[k]]) for row in constraints.required[0]}
    assert required_words == {("bike", "bicycle"), ()}
    assert [k for k in vocabulary.tokens if constraints.forbidden[0, ids[k]]] == ["cat", "motorcycle"]
    assert guidance.word_constraints([guide], vocabulary, 2, torch.device("cpu")).required.shape[1] == 1


def test_the_classifier_equals_that_of_the_backbone(predictor):
    extractor = predictor.captioner.feature_sources[0].extractor
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(predictor.ctx.device)
    with torch.inference_mode():
        expected = extractor.model.module(images)
        actual = predictor.observer.classifier(extractor.batch(images)[extractor.names[0]])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_a_guided_caption_contains_the_required_words(predictor, monkeypatch):
    image = Image.new("RGB", (64, 64), "gray")
    guide = guidance.make_guide(evidence(monkey=(0.0, 0.9), umbrella=(0.8, 0.0)))
    monkeypatch.setattr(predictor.observer, "guides", lambda images, _: [guide] * len(images))
    (row,) = predictor.rows(*predictor.generate([image])[1:])
    tokens = set(row["sentence"].split())
    assert tokens & {"monkey", "monkeys"}
    assert tokens & {"umbrella", "umbrellas"}
    assert row["guide"] == [
        {"label": "monkey", "score": 0.0, "probability": 0.9},
        {"label": "umbrella", "score": 0.8, "probability": 0.0},
    ]


def test_the_command_reports_the_required_concepts(cvlab):
    guided, plain = (
        json.loads(cvlab("caption", "sample", "--beam", 2, *options, "--json")[1])["results"][0]
        for options in ((), ("--no-guide",))
    )
    assert [item["label"] for item in guided["guide"]] == ["person"]
    assert "guide" not in plain


def test_bundled_detectors_are_available_by_name(predictor):
    detector = registry.get_experiment("detect").bundled_detector("everyday", predictor.ctx, 0.9)
    assert detector.score_threshold == 0.9
    assert len(detector.classes) == 80
