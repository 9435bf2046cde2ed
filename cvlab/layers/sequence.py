"""Token embedding and the loss of token sequences, forward and backward. After EECS 498, assignment 6."""

from typing import NamedTuple

import torch
from torch import Tensor


class Embedding:
    """A row of a table for each token."""

    @staticmethod
    def forward(w: Tensor, token_ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the rows of a table.

        Args:
            w: Table (V, D).
            token_ids: int64 (...).

        Returns:
            out (..., D), and the cache.
        """
        return w[token_ids], (w, token_ids)

    @staticmethod
    def backward(dout: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        """Return dw (V, D), the rows of dout (..., D) summed by token; None for the tokens."""
        w, token_ids = cache
        dw = torch.zeros_like(w)
        return dw.index_add_(0, token_ids.reshape(-1), dout.reshape(-1, w.shape[1]).to(w.dtype)), None


class TemporalSoftmax:
    """Cross-entropy of tokens, summed over time, averaged over the batch; padding does not count."""

    class Cache(NamedTuple):
        """What backward needs; `is_counted` (N, T) is 0 for padding, else 1."""

        log_p: Tensor
        token_ids: Tensor
        is_counted: Tensor

    @staticmethod
    def forward(logits: Tensor, token_ids: Tensor, pad_id: int) -> tuple[Tensor, Cache]:
        """Return the cross-entropy.

        Args:
            logits: (N, T, V).
            token_ids: int64 (N, T), the targets.
            pad_id: The token of padding.

        Returns:
            loss, a scalar, and the cache.
        """
        log_p = logits - logits.max(2, keepdim=True).values
        log_p = log_p - log_p.exp().sum(2, keepdim=True).log()
        is_counted = (token_ids != pad_id).to(logits.dtype)  # (N, T)
        target_log_p = log_p.gather(2, token_ids[..., None])[..., 0]
        loss = -(target_log_p * is_counted).sum() / len(token_ids)
        return loss, TemporalSoftmax.Cache(log_p, token_ids, is_counted)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, None]:
        """Return dlogits (N, T, V) for a scalar dout: (softmax - one-hot) / N, 0 for padding; None for the tokens."""
        dlogits = cache.log_p.exp()
        dlogits.scatter_add_(2, cache.token_ids[..., None], torch.full_like(dlogits[..., :1], -1.0))
        return dlogits * (cache.is_counted * (dout / len(cache.token_ids)))[..., None], None
