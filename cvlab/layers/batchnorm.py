"""BatchNorm with two derivations of its backward pass, and its spatial form. After EECS 498, assignment 3.

References:
    Ioffe and Szegedy, 2015, "Batch normalization", algorithm 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class BatchNorm:
    """Normalize each column over the rows; backward goes through the computational graph, node by node."""

    class Cache(NamedTuple):
        """What backward needs; `mean` and `var` are those of the batch, the latter biased."""

        centered: Tensor
        inv_std: Tensor
        gamma: Tensor
        mean: Tensor
        var: Tensor

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> tuple[Tensor, Cache]:
        """Return gamma * (x - mean) / sqrt(var + eps) + beta, with the statistics of the batch.

        Args:
            x: (N, D).
            gamma: (D,).
            beta: (D,).
            eps: Added to the variance.

        Returns:
            out (N, D), and the cache.
        """
        mean = x.mean(0)
        centered = x - mean  # (N, D)
        var = centered.square().mean(0)
        inv_std = (var + eps).rsqrt()
        out = torch.addcmul(beta, centered, inv_std * gamma)  # (N, D)
        return out, BatchNorm.Cache(centered, inv_std, gamma, mean, var)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx (N, D), dgamma (D,) and dbeta (D,), for dout (N, D)."""
        n = dout.shape[0]
        dot = (dout * cache.centered).sum(0)
        dgamma = dot * cache.inv_std
        dbeta = dout.sum(0)
        dinv_std = dot * cache.gamma
        dvar = -0.5 * dinv_std * cache.inv_std**3
        dcentered = torch.addcmul(dout * (cache.gamma * cache.inv_std), cache.centered, (2 / n) * dvar)  # (N, D)
        dmean = -dcentered.sum(0)
        return dcentered.add_(dmean / n), dgamma, dbeta

    @staticmethod
    def normalize(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        """Normalize x with running statistics, as in evaluation; all arguments broadcast."""
        return (x - mean) * ((var + eps).rsqrt() * gamma) + beta


class BatchNormAlt(BatchNorm):
    """BatchNorm with a simplified backward: the sums over the batch are taken once, then one pass over it."""

    @staticmethod
    def backward(dout: Tensor, cache: BatchNorm.Cache) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx, dgamma, dbeta: dx = gamma / (N std) * (N dout - dbeta - normalized * dgamma)."""
        n = dout.shape[0]
        dbeta = dout.sum(0)
        dgamma = (dout * cache.centered).sum(0) * cache.inv_std
        scale = cache.gamma * cache.inv_std
        dx = torch.addcmul(-scale * dbeta / n, dout, scale)  # (N, D)
        return dx.addcmul_(cache.centered, -scale * cache.inv_std * dgamma / n), dgamma, dbeta


def to_rows(x: Tensor) -> Tensor:
    """Return x (N, C, H, W) as rows of channels (N * H * W, C): permuted, never merely reshaped."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows (N * H * W, C) as images of the shape of `like` (N, C, H, W): the inverse of `to_rows`."""
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)  # (N, C, H, W)


class SpatialBatchNorm:
    """BatchNorm of images: each channel is normalized over the batch and all positions."""

    base: type[BatchNorm] = BatchNorm

    @classmethod
    def forward(cls, x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> tuple[Tensor, BatchNorm.Cache]:
        """Normalize x (N, C, H, W), with gamma and beta (C,); return out (N, C, H, W) and the cache."""
        rows, cache = cls.base.forward(to_rows(x), gamma, beta, eps)
        return from_rows(rows, x), cache

    @classmethod
    def backward(cls, dout: Tensor, cache: BatchNorm.Cache) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx (N, C, H, W), dgamma (C,) and dbeta (C,), for dout (N, C, H, W)."""
        rows, dgamma, dbeta = cls.base.backward(to_rows(dout), cache)
        return from_rows(rows, dout), dgamma, dbeta


class SpatialBatchNormAlt(SpatialBatchNorm):
    """SpatialBatchNorm with the simplified backward."""

    base = BatchNormAlt
