"""How near a sentence is to reference sentences, rare runs of words counting most: CIDEr-D.

Paper: Vedantam et al., 2015, "CIDEr". As in the COCO caption evaluation's code, words are not stemmed, and what it
takes for a sentence's length is its number of pairs of neighbours.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cvlab.ops.bleu import MAX_N, Tokens, ngrams

SIGMA = 6.0  # pairs of words: how fast the score falls with a difference in length
SCALE = 10.0
Vector = dict[tuple[Hashable, ...], float]


@dataclass(frozen=True)
class _Sentence:
    """A vector and its norm for runs of 1 to 4 words, and the number of pairs."""

    vectors: list[Vector]
    norms: list[float]
    pairs: int


class Cider:
    """The score, 0 to 10, of a sentence about one of several pictures, each with its references.

    It is the mean cosine of n-gram counts, weighted by how rare they are among the references of all pictures. Counts
    are clipped to the reference's, and a difference in length is penalised.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        document: Counter[tuple[Hashable, ...]] = Counter()
        for others in references:
            document.update({gram for other in others for n in range(1, MAX_N + 1) for gram in ngrams(other, n)})
        self._most_rare = math.log(max(len(references), 1))
        self._rarity = {gram: self._most_rare - math.log(count) for gram, count in document.items()}
        self._references = [[self._sentence(other) for other in others] for others in references]

    def _sentence(self, words: Tokens) -> _Sentence:
        vectors = [
            {gram: count * self._rarity.get(gram, self._most_rare) for gram, count in ngrams(words, n).items()}
            for n in range(1, MAX_N + 1)
        ]
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        return _Sentence(vectors, norms, max(0, len(words) - 1))

    def score(self, words: Tokens, picture: int) -> float:
        """Return the score of a sentence about the picture at a position among the references."""
        mine = self._sentence(words)
        total = 0.0
        for theirs in self._references[picture]:
            shared = 0.0
            for vector, norm, other, other_norm in zip(
                mine.vectors, mine.norms, theirs.vectors, theirs.norms, strict=True
            ):
                both = norm * other_norm
                if both:
                    common = [(value, other[gram]) for gram, value in vector.items() if gram in other]
                    shared += sum(min(value, wanted) * wanted for value, wanted in common) / both
            total += shared * math.exp(-((mine.pairs - theirs.pairs) ** 2) / (2 * SIGMA**2))
        return SCALE * total / MAX_N / len(self._references[picture])


def cider(found: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Return the mean score of sentences, each about the picture of its references."""
    if not found:
        return 0.0
    judge = Cider(references)
    return sum(judge.score(words, k) for k, words in enumerate(found)) / len(found)
