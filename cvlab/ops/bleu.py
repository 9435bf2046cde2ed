"""How near sentences are to reference sentences, over a whole set: BLEU and CIDEr-D.

Papers: Papineni et al., 2002, "BLEU" (clipped n-gram precisions, brevity penalty; corpus level, no smoothing, the
closest reference length, of two as close the shorter one, as sacrebleu has it); Vedantam et al., 2015, "CIDEr".
"""

import math
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
MOST = 4  # words of an n-gram
CIDER_SIGMA = 6.0  # words: how fast the score falls with a difference in length
CIDER_SCALE = 10.0


def bleu(found: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Return BLEU-1 to BLEU-4, in [0, 1], of sentences, each with one or more references.

    BLEU-n is the geometric mean of the precisions of 1 to n words, times the brevity penalty; 0 where one of them is 0.
    """
    right, total = [0] * MOST, [0] * MOST
    length = wanted_length = 0
    for words, others in zip(found, references, strict=True):
        length += len(words)
        wanted_length += min((len(other) for other in others), key=lambda n: (abs(n - len(words)), n))
        for n in range(1, MOST + 1):
            mine = ngrams(words, n)
            most: Counter[tuple[str, ...]] = Counter()
            for other in others:
                most |= ngrams(other, n)
            right[n - 1] += (mine & most).total()
            total[n - 1] += max(0, len(words) - n + 1)
    if not length:
        return [0.0] * MOST
    brevity = min(1.0, math.exp(1 - wanted_length / length))
    scores, logs = [], 0.0
    for n in range(MOST):
        logs = logs + math.log(right[n] / total[n]) if right[n] else -math.inf
        scores.append(brevity * math.exp(logs / (n + 1)))
    return scores


def ngrams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    """Count the runs of n words."""
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def cider(found: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Return CIDEr-D, 0 to 10: mean cosine of n-gram counts, weighted by how rare they are among the references.

    Counts are clipped to the reference's, and a difference in length is penalised; words are not stemmed, as in the
    COCO caption evaluation's code.
    """
    if not found:
        return 0.0
    document: Counter[tuple[str, ...]] = Counter()
    for others in references:
        document.update({gram for other in others for n in range(1, MOST + 1) for gram in ngrams(other, n)})
    log_count = math.log(max(len(references), 1))

    def vector(words: Words, n: int) -> dict[tuple[str, ...], float]:
        return {
            gram: count * (log_count - math.log(max(1.0, document[gram]))) for gram, count in ngrams(words, n).items()
        }

    def norm(values: dict[tuple[str, ...], float]) -> float:
        return math.sqrt(sum(value * value for value in values.values()))

    total = 0.0
    for words, others in zip(found, references, strict=True):
        score = 0.0
        for n in range(1, MOST + 1):
            mine = vector(words, n)
            for other in others:
                theirs = vector(other, n)
                both = norm(mine) * norm(theirs)
                if both:
                    shared = sum(
                        min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in mine.items()
                    )
                    apart = bigrams(words) - bigrams(other)
                    score += shared / both * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))
        total += CIDER_SCALE * score / MOST / len(others)
    return total / len(found)


def bigrams(words: Words) -> int:
    """Return how many pairs of neighbours a sentence has: what CIDEr-D's code takes for its length."""
    return max(0, len(words) - 1)
