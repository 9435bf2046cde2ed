"""BLEU and CIDEr against hand-computed cases and against the libraries that the field uses."""

import math

import pytest

from cvlab.ops import bleu, cider

FOUND = ["a dog runs on the grass", "two men play", "the the the the", "a child in a red coat jumps over a puddle"]
REFERENCES = [
    ["a dog is running on grass", "a brown dog runs across the grass"],
    ["two men play football in a park", "men playing", "two players in the park"],
    ["the cat is on the mat", "there is a cat on the mat"],
    ["a child in a red coat is jumping over a puddle", "a kid jumps over a puddle"],
]


def split(sentences):
    return [sentence.split() for sentence in sentences]


def test_clipped_precision_and_brevity_by_hand():
    # Papineni et al., 2002, section 2.1: of seven `the` two are right
    found = bleu.bleu([["the"] * 7], [split(["the cat is on the mat"])])
    assert found[0] == pytest.approx(2 / 7)
    assert found[1:] == [0, 0, 0]
    assert bleu.bleu([["a", "b"]], [[["a", "b", "c", "d"]]])[0] == pytest.approx(math.exp(1 - 4 / 2))
    perfect = bleu.bleu([["a", "b", "c", "d"]], [[["a", "b", "c", "d"], ["x"]]])
    assert perfect == pytest.approx([1, 1, 1, 1])
    assert bleu.bleu([[]], [[["a"]]]) == [0, 0, 0, 0]


def test_of_two_references_as_close_the_shorter_counts():
    assert bleu.bleu([["a", "b", "c"]], [[["a", "b"], ["a", "b", "c", "d"]]])[0] == pytest.approx(1.0)


def test_equal_to_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    most = max(len(others) for others in REFERENCES)
    streams = [[others[k] if k < len(others) else None for others in REFERENCES] for k in range(most)]
    mine = bleu.bleu(split(FOUND), [split(others) for others in REFERENCES])
    for n in range(1, 5):
        metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        assert mine[n - 1] == pytest.approx(metric.corpus_score(FOUND, streams).score / 100, abs=1e-9)


def test_cider_equal_to_coco_s():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    found = {k: [text] for k, text in enumerate(FOUND)}
    theirs, _ = Cider().compute_score(dict(enumerate(REFERENCES)), found)
    assert cider.cider(split(FOUND), [split(others) for others in REFERENCES]) == pytest.approx(theirs, abs=1e-9)


def test_cider_of_nothing():
    assert cider.cider([], []) == 0.0
    assert cider.cider([["a"]], [[["b"]]]) == 0.0
