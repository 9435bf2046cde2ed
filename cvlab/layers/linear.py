"""Linear, ReLU and Dropout with hand-written forward and backward passes. After EECS 498, assignment 3."""

from typing import NamedTuple

import torch
from torch import Tensor


class Linear:
    """Affine map of each row."""

    class Cache(NamedTuple):
        """What backward needs."""

        x: Tensor
        w: Tensor
        has_bias: bool

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Return x w^T + b.

        Args:
            x: (N, D).
            w: (M, D), as in torch.nn.
            b: (M,).

        Returns:
            out (N, M), and the cache.
        """
        out = x @ w.T  # (N, M)
        if b is not None:
            out += b
        return out, Linear.Cache(x, w, b is not None)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dx (N, D), dw (M, D) and db (M,), for dout (N, M)."""
        dx = dout @ cache.w  # (N, D)
        dw = dout.T @ cache.x  # (M, D)
        return dx, dw, dout.sum(0) if cache.has_bias else None


class ReLU:
    """max(x, 0), elementwise; the gradient at 0 is 0."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return max(x, 0), of the shape of x, twice: the output is the cache, positive just where x is."""
        out = x.clamp(min=0)
        return out, out

    @staticmethod
    def backward(dout: Tensor, cache: Tensor) -> tuple[Tensor]:
        """Return dx: dout where the output is positive (its sign is 1 there), else 0."""
        return (dout * cache.sign(),)


class Dropout:
    """Inverted dropout (Srivastava et al., 2014): units are zeroed in training and scaled up by 1 / (1 - p)."""

    @staticmethod
    def forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """Zero each element with probability p; the expectation of the output is x.

        Args:
            x: Any shape.
            p: Probability in [0, 1].

        Returns:
            out, of the shape of x, and the cache: the scaled mask.
        """
        mask = (torch.rand(x.shape, device=x.device) >= p).to(x.dtype) / max(1 - p, 1e-12)  # of p = 1 all are 0
        return x * mask, mask

    @staticmethod
    def backward(dout: Tensor, cache: Tensor) -> tuple[Tensor]:
        """Return dx: dout scaled by the same mask."""
        return (dout * cache,)
