"""Tokenization of captions, and the mapping between tokens (words) and their ids.

The tokenization is part of every score that is reported: lower-cased, split on white space, punctuation dropped, as a
token and at the ends of words; apostrophes and hyphens stay.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.errors import DataError

PAD, START, END, UNKNOWN = range(4)
SPECIAL_TOKENS = ("<null>", "<start>", "<end>", "<unk>")
PUNCTUATION = '.,!?;:"()`'


def tokenize(caption: str) -> list[str]:
    """Split a caption into tokens: its words in lower case."""
    tokens = (token.strip(PUNCTUATION) for token in caption.lower().split())
    return [token for token in tokens if any(character.isalnum() for character in token)]


@dataclass(frozen=True)
class Vocabulary:
    """The known words; the id of a token is its index plus the number of special tokens.

    Raises:
        DataError: A token occurs twice, is empty or is a special one.
    """

    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.tokens)) < len(self.tokens) or any(
            token in SPECIAL_TOKENS or not token for token in self.tokens
        ):
            raise DataError("a vocabulary has a word twice, an empty word or a special token")

    def __len__(self) -> int:
        return len(SPECIAL_TOKENS) + len(self.tokens)

    @property
    def token_to_id(self) -> dict[str, int]:
        """Return the id of each token."""
        return {token: len(SPECIAL_TOKENS) + k for k, token in enumerate(self.tokens)}

    def encode(self, captions: Iterable[Sequence[str]], max_length: int) -> Tensor:
        """Encode tokenized captions.

        Args:
            captions: N captions, as of `tokenize`.
            max_length: Number of tokens of each row; captions of more than max_length - 2 are cut.

        Returns:
            int64 (N, max_length): START, the tokens (UNKNOWN if not in the vocabulary), END, then PAD.
        """
        ids = self.token_to_id
        rows = []
        for tokens in captions:
            row = [START, *(ids.get(token, UNKNOWN) for token in tokens[: max_length - 2]), END]
            rows.append(row + [PAD] * (max_length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, max_length)

    def decode(self, token_ids: Iterable[int]) -> list[str]:
        """Return the tokens up to END; START and PAD are left out."""
        tokens = []
        for token_id in token_ids:
            if token_id == END:
                break
            if token_id not in (PAD, START):
                index = token_id - len(SPECIAL_TOKENS)
                tokens.append(SPECIAL_TOKENS[token_id] if index < 0 else self.tokens[index])
        return tokens


def build_vocabulary(captions: Iterable[Sequence[str]], min_count: int) -> Vocabulary:
    """Build the vocabulary of frequent tokens, sorted by falling frequency, then alphabetically.

    Args:
        captions: Captions, as of `tokenize`.
        min_count: Rarer tokens are left out.

    Raises:
        DataError: No token occurs that often.
    """
    counts = Counter(token for tokens in captions for token in tokens)
    frequent = [token for token, count in counts.items() if count >= min_count]
    if not frequent:
        raise DataError(f"no word occurs {min_count} times in the captions", "lower min_word_count")
    return Vocabulary(tuple(sorted(frequent, key=lambda token: (-counts[token], token))))
