"""CIDEr-D of sentences about images.

References:
    Vedantam et al., 2015, "CIDEr: consensus-based image description evaluation", section 4.

Differences from the paper:
    As in the code of the COCO caption evaluation, words are not stemmed, and the length of a sentence is its number of
    bigrams.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cvlab.ops.bleu import MAX_N, Tokens, ngrams

SIGMA = 6.0  # bigrams: how fast the score falls with a difference in length
SCALE = 10.0
TfIdf = dict[tuple[Hashable, ...], float]  # by n-gram


@dataclass(frozen=True)
class _Sentence:
    """TF-IDF vectors of 1- to 4-grams with their norms, and the number of bigrams."""

    vectors: list[TfIdf]
    norms: list[float]
    num_bigrams: int


class Cider:
    """CIDEr-D scores, 0 to 10, of sentences about images with known reference sentences.

    The score is the mean cosine similarity of TF-IDF vectors of n-grams with those of the references. Counts are
    clipped to the reference's, and a difference in length is penalized.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        """Count in how many images each n-gram occurs.

        Args:
            references: One or more tokenized sentences for each image.
        """
        document_counts: Counter[tuple[Hashable, ...]] = Counter()
        for sentences in references:
            document_counts.update({gram for s in sentences for n in range(1, MAX_N + 1) for gram in ngrams(s, n)})
        self._max_idf = math.log(max(len(references), 1))
        self._idf = {gram: self._max_idf - math.log(count) for gram, count in document_counts.items()}
        self._references = [[self._sentence(tokens) for tokens in sentences] for sentences in references]

    def _sentence(self, tokens: Tokens) -> _Sentence:
        vectors = [
            {gram: count * self._idf.get(gram, self._max_idf) for gram, count in ngrams(tokens, n).items()}
            for n in range(1, MAX_N + 1)
        ]
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        return _Sentence(vectors, norms, max(0, len(tokens) - 1))

    def score(self, tokens: Tokens, image: int) -> float:
        """Return the score of a sentence about an image.

        Args:
            tokens: The tokenized sentence.
            image: Index of the image among the references.

        Returns:
            a number in [0, 10].
        """
        candidate = self._sentence(tokens)
        total = 0.0
        for reference in self._references[image]:
            similarity = 0.0
            for vector, norm, reference_vector, reference_norm in zip(
                candidate.vectors, candidate.norms, reference.vectors, reference.norms, strict=True
            ):
                norm_product = norm * reference_norm
                if norm_product:
                    common = [(value, reference_vector[g]) for g, value in vector.items() if g in reference_vector]
                    similarity += sum(min(value, other) * other for value, other in common) / norm_product
            length_difference = candidate.num_bigrams - reference.num_bigrams
            total += similarity * math.exp(-(length_difference**2) / (2 * SIGMA**2))
        return SCALE * total / MAX_N / len(self._references[image])


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Return the mean CIDEr-D score of a corpus.

    Args:
        candidates: A tokenized sentence for each image.
        references: One or more tokenized sentences for each image.

    Returns:
        a number in [0, 10]; 0 without images.
    """
    if not candidates:
        return 0.0
    scorer = Cider(references)
    return sum(scorer.score(tokens, k) for k, tokens in enumerate(candidates)) / len(candidates)
