"""Words and their numbers: how a sentence is split, which words are known, and sentences as rows of numbers.

The tokenisation belongs to every score that is reported: lower-cased, split on white space, tokens without a letter or
a digit dropped.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.errors import DataError

PAD, START, END, UNKNOWN = range(4)
SPECIAL_TOKENS = ("<null>", "<start>", "<end>", "<unk>")


def tokenize(sentence: str) -> list[str]:
    """Split a sentence into words."""
    return [word for word in sentence.lower().split() if any(character.isalnum() for character in word)]


@dataclass(frozen=True)
class Vocabulary:
    """Known words; the number of a word is its place, after the four of `SPECIAL`."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.words)) < len(self.words) or any(word in SPECIAL_TOKENS or not word for word in self.words):
            raise DataError("a vocabulary with a word twice, an empty or a reserved one")

    def __len__(self) -> int:
        return len(SPECIAL_TOKENS) + len(self.words)

    @property
    def numbers(self) -> dict[str, int]:
        """Return the number of each word."""
        return {word: len(SPECIAL_TOKENS) + k for k, word in enumerate(self.words)}

    def encode(self, sentences: Iterable[Sequence[str]], length: int) -> Tensor:
        """Return sentences, split into words, as int64 (N, length): START, words, END, then NULL.

        A sentence of more than `length` - 2 words is cut; a word that is not known becomes UNKNOWN.
        """
        numbers = self.numbers
        rows = []
        for words in sentences:
            row = [START, *(numbers.get(word, UNKNOWN) for word in words[: length - 2]), END]
            rows.append(row + [PAD] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, length)

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Return the words up to END, without START and NULL."""
        found = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                found.append(
                    SPECIAL_TOKENS[number] if number < len(SPECIAL_TOKENS) else self.words[number - len(SPECIAL_TOKENS)]
                )
        return found


def build_vocabulary(sentences: Iterable[Sequence[str]], threshold: int) -> Vocabulary:
    """Return the words that stand at least `threshold` times in sentences, the most frequent first, then by letters."""
    counts = Counter(word for words in sentences for word in words)
    kept = [word for word, count in counts.items() if count >= threshold]
    if not kept:
        raise DataError(f"no word stands {threshold} times in the sentences", "a lower threshold")
    return Vocabulary(tuple(sorted(kept, key=lambda word: (-counts[word], word))))
