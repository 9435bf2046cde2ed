"""Tokenization of captions, and the mapping between words and token ids.

The tokenization is part of every score that is reported: lower-cased, split on white space, tokens without a letter or
digit dropped.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.errors import DataError

PAD, START, END, UNKNOWN = range(4)
SPECIAL_TOKENS = ("<null>", "<start>", "<end>", "<unk>")


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words."""
    return [word for word in caption.lower().split() if any(character.isalnum() for character in word)]


@dataclass(frozen=True)
class Vocabulary:
    """The known words; the id of a word is its index plus the number of special tokens.

    Raises:
        DataError: A word occurs twice, is empty or is a special token.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.words)) < len(self.words) or any(word in SPECIAL_TOKENS or not word for word in self.words):
            raise DataError("a vocabulary has a word twice, an empty word or a special token")

    def __len__(self) -> int:
        return len(SPECIAL_TOKENS) + len(self.words)

    @property
    def word_to_id(self) -> dict[str, int]:
        """Return the token id of each word."""
        return {word: len(SPECIAL_TOKENS) + k for k, word in enumerate(self.words)}

    def encode(self, captions: Iterable[Sequence[str]], max_length: int) -> Tensor:
        """Encode tokenized captions.

        Args:
            captions: N captions, split into words.
            max_length: Number of tokens of each row; captions of more than max_length - 2 words are cut.

        Returns:
            int64 (N, max_length): START, the words (UNKNOWN if not in the vocabulary), END, then PAD.
        """
        ids = self.word_to_id
        rows = []
        for words in captions:
            row = [START, *(ids.get(word, UNKNOWN) for word in words[: max_length - 2]), END]
            rows.append(row + [PAD] * (max_length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, max_length)

    def decode(self, token_ids: Iterable[int]) -> list[str]:
        """Return the words up to END; START and PAD are left out."""
        words = []
        for token_id in token_ids:
            if token_id == END:
                break
            if token_id not in (PAD, START):
                index = token_id - len(SPECIAL_TOKENS)
                words.append(SPECIAL_TOKENS[token_id] if index < 0 else self.words[index])
        return words


def build_vocabulary(captions: Iterable[Sequence[str]], min_count: int) -> Vocabulary:
    """Return the words that occur at least `min_count` times, by falling frequency, then alphabetically.

    Args:
        captions: Captions, split into words.
        min_count: Rarer words are left out.

    Raises:
        DataError: No word occurs that often.
    """
    counts = Counter(word for words in captions for word in words)
    frequent = [word for word, count in counts.items() if count >= min_count]
    if not frequent:
        raise DataError(f"no word occurs {min_count} times in the captions", "lower min_word_count")
    return Vocabulary(tuple(sorted(frequent, key=lambda word: (-counts[word], word))))
