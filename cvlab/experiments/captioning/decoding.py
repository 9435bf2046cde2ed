"""Sentences from a captioner: beam search, of which greedy decoding is the case of one beam."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.data.vocabulary import END, PAD, START, UNKNOWN
from cvlab.experiments.captioning.model import Captioner

NEVER = (PAD, START, UNKNOWN)  # said in no sentence
NONE = -1e9  # a score that loses against every other


@dataclass(frozen=True)
class Sentence:
    """The numbers of a sentence's words, END at the end where it came to one, and its score."""

    words: tuple[int, ...]
    score: float


@torch.inference_mode()
def search(model: Captioner, features: Tensor, width: int = 5, length: int = 16, alpha: float = 0.7) -> list[Sentence]:
    """Return the best sentence for each of N photos (N, L, C), of at most `length` words with END.

    `width` sentences of a photo are followed at once. The score is the sum of the words' log-probabilities over
    (number of words) ** alpha (Wu et al., 2016, without their constant), so that longer sentences are not put off.
    """
    was_training = model.training
    model.eval()
    n, device = len(features), features.device
    state = model.start(features)
    offset = torch.arange(n, device=device)[:, None]
    total = torch.zeros(n, 1, device=device)  # log-probability of each sentence that is followed
    said = torch.full((n, 1, 1), START, device=device)
    best = torch.full((n,), NONE, device=device)
    kept = torch.full((n, length), END, device=device)
    for t in range(length):
        beams = total.shape[1]
        scores, state, _ = model.step(state, said[:, :, -1].flatten())
        log_p = scores.log_softmax(1)
        log_p[:, NEVER] = NONE
        if t == length - 1:  # it has to end here
            log_p[:, END + 1 :] = NONE
        sums = total[:, :, None] + log_p.view(n, beams, -1)  # (N, B, V)
        ended, place = (sums[:, :, END] / (t + 1) ** alpha).max(1)
        better = ended > best
        best = torch.where(better, ended, best)
        whole = said[torch.arange(n, device=device), place, 1:]
        kept[better, :t] = whole[better]
        kept[better, t:] = END
        sums[:, :, END] = NONE
        total, chosen = sums.flatten(1).topk(min(width, sums.shape[1] * (sums.shape[2] - 4)), 1)
        beam, word = chosen // sums.shape[2], chosen % sums.shape[2]
        said = torch.cat([said[offset, beam], word[:, :, None]], 2)
        state = state.at((offset * beams + beam).flatten())
        # No longer sentence can win: its sum only falls, and at most length words divide it.
        if bool((total[:, 0] / length**alpha < best).all()):
            break
    model.train(was_training)
    return [Sentence(_cut(row), score) for row, score in zip(kept.tolist(), best.tolist(), strict=True)]


def _cut(row: list[int]) -> tuple[int, ...]:
    return tuple(row[: row.index(END) + 1] if END in row else row)


@torch.no_grad()
def draw(model: Captioner, features: Tensor, count: int, length: int) -> Tensor:
    """Draw `count` sentences for each of N photos (N, L, C), word by word as likely as they are: (N * count, T).

    Those of a photo stand one after the other: START, at most `length` words with END, then NULL.
    """
    was_training = model.training
    model.eval()
    device = features.device
    state = model.start(features).at(torch.arange(len(features), device=device).repeat_interleave(count))
    said = [torch.full((len(state.h),), START, device=device)]
    is_ended = torch.zeros(len(state.h), dtype=torch.bool, device=device)
    for t in range(length):
        scores, state, _ = model.step(state, said[-1])
        scores[:, NEVER] = NONE
        word = _drawn(scores) if t < length - 1 else torch.full_like(said[-1], END)
        said.append(word.masked_fill(is_ended, PAD))
        is_ended = is_ended | (word == END)
        if bool(is_ended.all()):
            break
    model.train(was_training)
    return torch.stack(said, 1)


def _drawn(scores: Tensor) -> Tensor:
    """Draw one of each row by the softmax of scores (M, V): (M,). One random number a row, not one a score."""
    reached = (scores - scores.amax(1, keepdim=True)).exp_().cumsum_(1)
    wanted = torch.rand(len(scores), 1, device=scores.device) * reached[:, -1:]
    return torch.searchsorted(reached, wanted, right=True)[:, 0].clamp(max=scores.shape[1] - 1)


@torch.inference_mode()
def looks(model: Captioner, features: Tensor, words: tuple[int, ...]) -> Tensor:
    """Return where a captioner looks before each of the words of a sentence: (words, L), rows sum to 1."""
    assert model.is_attending
    state = model.start(features)
    found = []
    for word in (START, *words[:-1]):
        _, state, weights = model.step(state, torch.tensor([word], device=features.device))
        assert weights is not None
        found.append(weights[0])
    return torch.stack(found)
