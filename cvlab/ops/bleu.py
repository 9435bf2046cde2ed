"""How near sentences are to reference sentences, over a whole set: BLEU.

Paper: Papineni et al., 2002, "BLEU" (clipped n-gram precisions, brevity penalty; corpus level, no smoothing, the
closest reference length, of two as close the shorter one, as sacrebleu has it).
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]
MAX_N = 4  # words of an n-gram


def bleu(found: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return BLEU-1 to BLEU-4, in [0, 1], of sentences, each with one or more references.

    BLEU-n is the geometric mean of the precisions of 1 to n words, times the brevity penalty; 0 where one of them is 0.
    """
    right, total = [0] * MAX_N, [0] * MAX_N
    length = wanted_length = 0
    for words, others in zip(found, references, strict=True):
        length += len(words)
        wanted_length += min((len(other) for other in others), key=lambda n: (abs(n - len(words)), n))
        for n in range(1, MAX_N + 1):
            mine = ngrams(words, n)
            most: Counter[tuple[Hashable, ...]] = Counter()
            for other in others:
                most |= ngrams(other, n)
            right[n - 1] += (mine & most).total()
            total[n - 1] += max(0, len(words) - n + 1)
    if not length:
        return [0.0] * MAX_N
    brevity = min(1.0, math.exp(1 - wanted_length / length))
    scores, logs = [], 0.0
    for n in range(MAX_N):
        logs = logs + math.log(right[n] / total[n]) if right[n] else -math.inf
        scores.append(brevity * math.exp(logs / (n + 1)))
    return scores


def ngrams(words: Tokens, n: int) -> Counter[tuple[Hashable, ...]]:
    """Count the runs of n words."""
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))
