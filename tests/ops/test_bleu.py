"""BLEU and CIDEr against hand-computed cases and against sacrebleu and pycocoevalcap."""

import math

import pytest

from cvlab.ops import bleu, cider

CAPTIONS = ["a dog runs on the grass", "two men play", "the the the the", "a child in a red coat jumps over a puddle"]
REFERENCES = [
    ["a dog is running on grass", "a brown dog runs across the grass"],
    ["two men play football in a park", "men playing", "two players in the park"],
    ["the cat is on the mat", "there is a cat on the mat"],
    ["a child in a red coat is jumping over a puddle", "a kid jumps over a puddle"],
]


def tokenize(sentences):
    return [sentence.split() for sentence in sentences]


def test_clipped_precision_and_brevity_penalty_match_hand_computed_values():
    # Papineni et al., 2002, section 2.1: two of seven `the` are right
    scores = bleu.bleu([["the"] * 7], [tokenize(["the cat is on the mat"])])
    assert scores[0] == pytest.approx(2 / 7)
    assert scores[1:] == [0, 0, 0]
    assert bleu.bleu([["a", "b"]], [[["a", "b", "c", "d"]]])[0] == pytest.approx(math.exp(1 - 4 / 2))
    perfect = bleu.bleu([["a", "b", "c", "d"]], [[["a", "b", "c", "d"], ["x"]]])
    assert perfect == pytest.approx([1, 1, 1, 1])
    assert bleu.bleu([[]], [[["a"]]]) == [0, 0, 0, 0]


def test_the_shorter_of_two_equally_close_references_counts():
    assert bleu.bleu([["a", "b", "c"]], [[["a", "b"], ["a", "b", "c", "d"]]])[0] == pytest.approx(1.0)


def test_bleu_equals_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    max_references = max(len(references) for references in REFERENCES)
    streams = [
        [references[k] if k < len(references) else None for references in REFERENCES] for k in range(max_references)
    ]
    actual = bleu.bleu(tokenize(CAPTIONS), [tokenize(references) for references in REFERENCES])
    for n in range(1, 5):
        metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        assert actual[n - 1] == pytest.approx(metric.corpus_score(CAPTIONS, streams).score / 100, abs=1e-9)


def test_cider_equals_that_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    captions = {k: [text] for k, text in enumerate(CAPTIONS)}
    expected, _ = Cider().compute_score(dict(enumerate(REFERENCES)), captions)
    actual = cider.cider(tokenize(CAPTIONS), [tokenize(references) for references in REFERENCES])
    assert actual == pytest.approx(expected, abs=1e-9)


def test_cider_of_no_captions():
    assert cider.cider([], []) == 0.0
    assert cider.cider([["a"]], [[["b"]]]) == 0.0
