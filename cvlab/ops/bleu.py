"""BLEU of a corpus of sentences.

References:
    Papineni et al., 2002, "BLEU: a method for automatic evaluation of machine translation".

Differences from the paper:
    None: corpus level, clipped n-gram precisions, brevity penalty, no smoothing. The reference length is the closest
    one, of two equally close ones the shorter, as in sacrebleu.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]
MAX_N = 4  # tokens of an n-gram


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of a corpus.

    BLEU-n is the geometric mean of the precisions of 1- to n-grams, times the brevity penalty; 0 if one of them is 0.

    Args:
        candidates: A tokenized sentence for each image.
        references: One or more tokenized sentences for each image.

    Returns:
        four numbers in [0, 1].
    """
    num_matches, num_ngrams = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for candidate, image_references in zip(candidates, references, strict=True):
        length += len(candidate)
        lengths = (len(reference) for reference in image_references)
        reference_length += min(lengths, key=lambda n: (abs(n - len(candidate)), n))
        for n in range(1, MAX_N + 1):
            counts = ngrams(candidate, n)
            max_counts: Counter[tuple[Hashable, ...]] = Counter()
            for reference in image_references:
                max_counts |= ngrams(reference, n)
            num_matches[n - 1] += (counts & max_counts).total()
            num_ngrams[n - 1] += max(0, len(candidate) - n + 1)
    if not length:
        return [0.0] * MAX_N
    brevity_penalty = min(1.0, math.exp(1 - reference_length / length))
    scores, log_sum = [], 0.0
    for n in range(MAX_N):
        log_sum = log_sum + math.log(num_matches[n] / num_ngrams[n]) if num_matches[n] else -math.inf
        scores.append(brevity_penalty * math.exp(log_sum / (n + 1)))
    return scores


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[Hashable, ...]]:
    """Count the n-grams of a tokenized sentence."""
    return Counter(tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1))
