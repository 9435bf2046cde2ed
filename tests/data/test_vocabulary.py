"""Tokenization, and encoding and decoding of captions."""

import pytest

from cvlab.data import vocabulary
from cvlab.data.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from cvlab.errors import DataError


def test_tokenize_lower_cases_and_drops_punctuation():
    assert vocabulary.tokenize("A dog 's  ball , 2 cats .") == ["a", "dog", "'s", "ball", "2", "cats"]
    assert vocabulary.tokenize('A "stop" sign, (red) on St. John\'s t-shirt.') == (
        ["a", "stop", "sign", "red", "on", "st", "john's", "t-shirt"]
    )


def test_frequent_words_come_first_and_rare_ones_are_unknown():
    vocab = vocabulary.build_vocabulary([["b", "a", "b"], ["a", "c", "b"]], 2)
    assert vocab.tokens == ("b", "a")
    assert len(vocab) == 6
    token_ids = vocab.encode([["a", "c"], ["b"] * 9], 5)
    assert token_ids.tolist() == [[START, 5, UNKNOWN, END, PAD], [START, 4, 4, 4, END]]
    assert vocab.decode(token_ids[0].tolist()) == ["a", "<unk>"]
    assert vocab.encode([], 5).shape == (0, 5)


def test_no_word_is_frequent_enough():
    with pytest.raises(DataError, match="no word occurs 3 times"):
        vocabulary.build_vocabulary([["a", "b"]], 3)


@pytest.mark.parametrize("tokens", [("a", "a"), ("",), ("<end>",)])
def test_repeated_empty_and_special_words_are_rejected(tokens):
    with pytest.raises(DataError):
        Vocabulary(tokens)
