"""Decode captions: beam search (greedy with one beam), sampling, and the attention weights of a caption.

References:
    Anderson et al., 2017, "Guided open vocabulary image captioning with constrained beam search".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.data.vocabulary import END, PAD, SPECIAL_TOKENS, START, UNKNOWN
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


@dataclass(frozen=True)
class WordConstraints:
    """Which tokens the captions of N photos must have, and which they must not have.

    Attributes:
        required: bool (N, C, V). A caption has at least one token of each of the C sets of its photo; an empty set
            requires nothing. No set contains END or one of `SUPPRESSED`.
        forbidden: bool (N, V). A caption has none of these tokens; END is not one of them.
    """

    required: Tensor
    forbidden: Tensor


@torch.inference_mode()
def beam_search(
    model: CaptionModel,
    features: Tensor,
    beam_width: int = 5,
    max_length: int = 16,
    length_penalty: float = 0.7,
    constraints: WordConstraints | None = None,
) -> list[Hypothesis]:
    """Find the best caption of each photo by beam search.

    Args:
        model: The captioner; it is put into evaluation mode meanwhile.
        features: Photo features (N, L, C).
        beam_width: Number of partial captions of each state that are extended in each step; 1 is greedy decoding.
        max_length: Maximum number of tokens, END included; more than the number of required sets.
        length_penalty: The score is the sum of log-probabilities over (number of tokens) ** length_penalty
            (Wu et al., 2016, without their constant); 0 favors short captions.
        constraints: On the device of the features; None for none.

    Returns:
        One hypothesis for each photo.
    """
    was_training = model.training
    model.eval()
    n, device = len(features), features.device
    states = _ConstraintStates(constraints, n, device)
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
        end_score, end_beam = (states.end_log_p(candidates[:, :, END]) / (t + 1) ** length_penalty).max(1)
        is_better = end_score > best_score
        best_score = torch.where(is_better, end_score, best_score)
        finished = beams[torch.arange(n, device=device), end_beam, 1:]
        best[is_better, :t] = finished[is_better]
        best[is_better, t:] = END
        candidates[:, :, END] = MINUS_INF
        vocab_size = candidates.shape[2]
        beam_log_p, top = states.extend(candidates, min(beam_width, num_beams * (vocab_size - len(SPECIAL_TOKENS))))
        parent, token_ids = top // vocab_size, top % vocab_size
        beams = torch.cat([beams[row, parent], token_ids[:, :, None]], 2)
        state = state.select((row * num_beams + parent).flatten())
        # No extension can win any more: log-probabilities only fall, and the divisor is at most max_length's.
        if bool((beam_log_p.amax(1) / max_length**length_penalty < best_score).all()):
            break
    model.train(was_training)
    return [
        Hypothesis(_until_end(token_ids), score)
        for token_ids, score in zip(best.tolist(), best_score.tolist(), strict=True)
    ]


class _ConstraintStates:
    """The states of a constrained beam search: a bit for each required set that a beam has a token of.

    With C sets there are 2 ** C states, and each has its own beams; a caption is complete in the state of all sets. The
    probabilities are those of the model: they are not renormalized over what the constraints allow.

    Attributes:
        of_beams: int64 (N, B), the state of each beam.
    """

    def __init__(self, constraints: WordConstraints | None, n: int, device: torch.device) -> None:
        self.forbidden: Tensor | None = None
        self.num_states = 1
        self.of_beams = torch.zeros(n, 1, dtype=torch.int64, device=device)
        self.bits = self.of_beams[:, :, None]  # (N, 1, V), the sets that each token is in
        if constraints is not None:
            num_sets = constraints.required.shape[1]
            self.forbidden = constraints.forbidden[:, None]
            self.num_states = 2**num_sets
            bit = 2 ** torch.arange(num_sets, device=device)[:, None]
            self.bits = (constraints.required * bit).sum(1, keepdim=True)
            is_empty = ~constraints.required.any(2, keepdim=True)
            self.of_beams = (is_empty * bit).sum(1)

    def end_log_p(self, log_p: Tensor) -> Tensor:
        """Return the log-probabilities (N, B) of complete captions, MINUS_INF if they lack a required token."""
        return log_p if self.num_states == 1 else log_p.masked_fill(self.of_beams < self.num_states - 1, MINUS_INF)

    def extend(self, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Choose the best extensions of beams, `count` of each state.

        Args:
            candidates: Log-probabilities (N, B, V) of beams with one more token; changed in place.
            count: Number of beams of each state.

        Returns:
            The log-probabilities of the new beams (N, num_states * count), and their indices in the flattened
            candidates of their photo. A state with fewer beams is filled up with ones of MINUS_INF or less.
        """
        if self.forbidden is not None:
            candidates.masked_fill_(self.forbidden, MINUS_INF)
        if self.num_states == 1:
            return candidates.flatten(1).topk(count, 1)
        new_states = self.of_beams[:, :, None] | self.bits  # (N, B, V)
        top = [
            candidates.masked_fill(new_states != state, MINUS_INF).flatten(1).topk(count, 1)
            for state in range(self.num_states)
        ]
        self.of_beams = torch.arange(self.num_states, device=candidates.device).repeat_interleave(count)[None]
        self.of_beams = self.of_beams.expand(len(candidates), -1)
        return torch.cat([values for values, _ in top], 1), torch.cat([indices for _, indices in top], 1)


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
