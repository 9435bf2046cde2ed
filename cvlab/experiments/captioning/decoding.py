"""Decode captions: beam search (greedy with one beam), sampling, and the attention weights of a caption."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.data.vocabulary import END, PAD, START, UNKNOWN
from cvlab.experiments.captioning.base import MINUS_INF, CaptionModel

SUPPRESSED = (PAD, START, UNKNOWN)  # tokens that are never generated


@dataclass(frozen=True)
class Hypothesis:
    """A decoded caption.

    Attributes:
        token_ids: Its tokens without START; END is the last one.
        score: The sum of their log-probabilities, divided by their number to the power `length_penalty`.
    """

    token_ids: tuple[int, ...]
    score: float


@torch.inference_mode()
def beam_search(
    model: CaptionModel, features: Tensor, beam_width: int = 5, max_length: int = 16, length_penalty: float = 0.7
) -> list[Hypothesis]:
    """Find the best caption of each photo by beam search.

    Args:
        model: The captioner; it is put into evaluation mode meanwhile.
        features: Photo features (N, L, C).
        beam_width: Number of partial captions that are extended in each step; 1 is greedy decoding.
        max_length: Maximum number of tokens, END included.
        length_penalty: The score is the sum of log-probabilities over (number of tokens) ** length_penalty
            (Wu et al., 2016, without their constant); 0 favors short captions.

    Returns:
        One hypothesis for each photo.
    """
    was_training = model.training
    model.eval()
    n, device = len(features), features.device
    state = model.initial_state(features)
    row = torch.arange(n, device=device)[:, None]
    beam_log_p = torch.zeros(n, 1, device=device)  # sum of log-probabilities of each beam
    beams = torch.full((n, 1, 1), START, device=device)  # (N, B, t + 1)
    best_score = torch.full((n,), MINUS_INF, device=device)
    best = torch.full((n, max_length), END, device=device)
    for t in range(max_length):
        num_beams = beam_log_p.shape[1]
        logits, state, _ = model.step(state, beams[:, :, -1].flatten())
        logits[:, SUPPRESSED] = MINUS_INF
        log_p = logits.log_softmax(1)
        if t == max_length - 1:  # only END is left
            log_p[:, END + 1 :] = MINUS_INF
        candidates = beam_log_p[:, :, None] + log_p.view(n, num_beams, -1)  # (N, B, V)
        end_score, end_beam = (candidates[:, :, END] / (t + 1) ** length_penalty).max(1)
        is_better = end_score > best_score
        best_score = torch.where(is_better, end_score, best_score)
        finished = beams[torch.arange(n, device=device), end_beam, 1:]
        best[is_better, :t] = finished[is_better]
        best[is_better, t:] = END
        candidates[:, :, END] = MINUS_INF
        vocab_size = candidates.shape[2]
        beam_log_p, top = candidates.flatten(1).topk(min(beam_width, num_beams * (vocab_size - 4)), 1)
        parent, token_ids = top // vocab_size, top % vocab_size
        beams = torch.cat([beams[row, parent], token_ids[:, :, None]], 2)
        state = state.select((row * num_beams + parent).flatten())
        # No extension can win any more: log-probabilities only fall, and the divisor is at most max_length's.
        if bool((beam_log_p[:, 0] / max_length**length_penalty < best_score).all()):
            break
    model.train(was_training)
    return [
        Hypothesis(_until_end(token_ids), score)
        for token_ids, score in zip(best.tolist(), best_score.tolist(), strict=True)
    ]


def _until_end(token_ids: list[int]) -> tuple[int, ...]:
    return tuple(token_ids[: token_ids.index(END) + 1] if END in token_ids else token_ids)


@torch.no_grad()
def sample(model: CaptionModel, features: Tensor, num_samples: int, max_length: int) -> Tensor:
    """Sample captions from the model's distribution.

    Args:
        model: The captioner; it is put into evaluation mode meanwhile.
        features: Photo features (N, L, C).
        num_samples: Number of captions of each photo.
        max_length: Maximum number of tokens, END included, START not.

    Returns:
        Token ids, int64 (N * num_samples, T), those of a photo consecutive: START, the caption, END, then PAD.
    """
    was_training = model.training
    model.eval()
    device = features.device
    state = model.initial_state(features)
    state = state.select(torch.arange(len(features), device=device).repeat_interleave(num_samples))
    columns = [torch.full((len(features) * num_samples,), START, device=device)]
    has_ended = torch.zeros(len(features) * num_samples, dtype=torch.bool, device=device)
    for t in range(max_length):
        logits, state, _ = model.step(state, columns[-1])
        logits[:, SUPPRESSED] = MINUS_INF
        token_ids = _sample_categorical(logits) if t < max_length - 1 else torch.full_like(columns[-1], END)
        columns.append(token_ids.masked_fill(has_ended, PAD))
        has_ended = has_ended | (token_ids == END)
        if bool(has_ended.all()):
            break
    model.train(was_training)
    return torch.stack(columns, 1)


def _sample_categorical(logits: Tensor) -> Tensor:
    """Sample from the softmax of logits (M, V) by inverse transform, with one random number for each row: (M,)."""
    cumulative = (logits - logits.amax(1, keepdim=True)).exp_().cumsum_(1)
    threshold = torch.rand(len(logits), 1, device=logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


@torch.inference_mode()
def attention_weights(model: CaptionModel, features: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """Return the attention weights of each token of a caption.

    Args:
        model: A captioner with attention.
        features: Features of one photo (1, L, C).
        token_ids: The T tokens of the caption, without START.

    Returns:
        Weights (T, L) over the spatial positions before each token; each row sums to 1.
    """
    assert model.has_attention
    state = model.initial_state(features)
    rows = []
    for token_id in (START, *token_ids[:-1]):
        _, state, weights = model.step(state, torch.tensor([token_id], device=features.device))
        assert weights is not None
        rows.append(weights[0])
    return torch.stack(rows)
