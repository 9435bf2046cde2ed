"""Words as vectors, and the loss of sentences: forward and backward written out. EECS 498, assignment 6."""

from typing import NamedTuple

import torch
from torch import Tensor


class Embedding:
    """A row of a table for each word."""

    @staticmethod
    def forward(w: Tensor, words: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return w[words]: table w (V, D), int64 words of any shape (...); out (..., D)."""
        return w[words], (w, words)

    @staticmethod
    def backward(dout: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        """Return dw (V, D): the rows of dout, added up for each word."""
        w, words = cache
        dw = torch.zeros_like(w)
        return dw.index_add_(0, words.reshape(-1), dout.reshape(-1, w.shape[1]).to(w.dtype)), None


class TemporalSoftmax:
    """Cross-entropy of words, summed over time, averaged over the batch; words equal to `null` count nothing."""

    class Cache(NamedTuple):
        """What backward needs."""

        log_p: Tensor
        words: Tensor
        counts: Tensor

    @staticmethod
    def forward(scores: Tensor, words: Tensor, null: int) -> tuple[Tensor, Cache]:
        """Return the loss, a scalar, for scores (N, T, V) and int64 words (N, T)."""
        log_p = scores - scores.max(2, keepdim=True).values
        log_p = log_p - log_p.exp().sum(2, keepdim=True).log()
        counts = (words != null).to(scores.dtype)  # (N, T)
        right = log_p.gather(2, words[..., None])[..., 0]
        return -(right * counts).sum() / len(words), TemporalSoftmax.Cache(log_p, words, counts)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, None]:
        """Return dscores (N, T, V): (softmax - one hot) / N where a word counts, else 0."""
        dscores = cache.log_p.exp()
        dscores.scatter_add_(2, cache.words[..., None], torch.full_like(dscores[..., :1], -1.0))
        return dscores * (cache.counts * (dout / len(cache.words)))[..., None], None
