"""Conv2d by im2col and one matrix product, and MaxPool2d, on channels_last images. After EECS 498, assignment 3.

A patch is a row of (K, K, C) numbers with the channels innermost, as they lie in memory, so that unfolding is K * K
copies of long runs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the number of positions of a kernel along one side of `size` pixels."""
    return (size + 2 * padding - kernel) // stride + 1


def unfold(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Return every patch of a batch of images as a row (im2col).

    Args:
        x: (N, C, H, W).
        kernel: K, height and width of a patch.
        stride: Pixels between patches.
        padding: Zeros added on each side.

    Returns:
        patches (N * Ho * Wo, K * K * C).
    """
    n, c, h, w = x.shape
    ho, wo = out_size(h, kernel, stride, padding), out_size(w, kernel, stride, padding)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))  # (N, H + 2P, W + 2P, C)
    patches = x.new_empty(n, ho, wo, kernel, kernel, c)
    for i in range(kernel):
        for j in range(kernel):
            patches[:, :, :, i, j] = padded[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
    return patches.view(n * ho * wo, kernel * kernel * c)


def fold(patches: Tensor, shape: torch.Size, kernel: int, stride: int, padding: int) -> Tensor:
    """Sum patches where they overlap (col2im): the adjoint of `unfold`.

    Args:
        patches: (N * Ho * Wo, K * K * C).
        shape: N, C, H, W of the images.
        kernel: K, height and width of a patch.
        stride: Pixels between patches.
        padding: Zeros that were added on each side.

    Returns:
        images (N, C, H, W), channels_last.
    """
    n, c, h, w = shape
    ho, wo = out_size(h, kernel, stride, padding), out_size(w, kernel, stride, padding)
    patches = patches.view(n, ho, wo, kernel, kernel, c)
    padded = patches.new_zeros(n, h + 2 * padding, w + 2 * padding, c)
    for i in range(kernel):
        for j in range(kernel):
            padded[:, i : i + stride * ho : stride, j : j + stride * wo : stride] += patches[:, :, :, i, j]
    return padded[:, padding : padding + h, padding : padding + w].permute(0, 3, 1, 2)  # (N, C, H, W)


class Conv2d:
    """Cross-correlation of images with square kernels."""

    class Cache(NamedTuple):
        """What backward needs."""

        patches: Tensor
        w: Tensor
        shape: torch.Size
        stride: int
        padding: int
        has_bias: bool

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor | None = None, stride: int = 1, padding: int = 0
    ) -> tuple[Tensor, Cache]:
        """Convolve a batch of images.

        Args:
            x: (N, C, H, W).
            w: (F, C, K, K), as in torch.nn.
            b: (F,).
            stride: Stride of the kernels, in both directions.
            padding: Zeros added on each side.

        Returns:
            out (N, F, Ho, Wo), channels_last, and the cache.
        """
        n, _, height, width = x.shape
        f, _, k, _ = w.shape
        patches = unfold(x, k, stride, padding)  # (N * Ho * Wo, K * K * C)
        rows = w.permute(0, 2, 3, 1).reshape(f, -1)  # (F, K * K * C)
        out = patches @ rows.T if b is None else torch.addmm(b, patches, rows.T)  # (N * Ho * Wo, F)
        ho, wo = out_size(height, k, stride, padding), out_size(width, k, stride, padding)
        cache = Conv2d.Cache(patches, w, x.shape, stride, padding, b is not None)
        return out.view(n, ho, wo, f).permute(0, 3, 1, 2), cache  # (N, F, Ho, Wo)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dx (N, C, H, W), dw (F, C, K, K) and db (F,), for dout (N, F, Ho, Wo)."""
        f, c, k, _ = cache.w.shape
        drows = dout.permute(0, 2, 3, 1).reshape(-1, f)  # (N * Ho * Wo, F)
        dw = (drows.T @ cache.patches).view(f, k, k, c).permute(0, 3, 1, 2)  # (F, C, K, K)
        dpatches = drows @ cache.w.permute(0, 2, 3, 1).reshape(f, -1)  # (N * Ho * Wo, K * K * C)
        dx = fold(dpatches, cache.shape, k, cache.stride, cache.padding)  # (N, C, H, W)
        return dx, dw, drows.sum(0) if cache.has_bias else None


class MaxPool2d:
    """Maximum of each window."""

    class Cache(NamedTuple):
        """What backward needs: the input and the output with the channels innermost."""

        rows: Tensor
        out: Tensor
        kernel: int
        stride: int

    @staticmethod
    def forward(x: Tensor, kernel: int = 2, stride: int | None = None) -> tuple[Tensor, Cache]:
        """Return the maximum of each square window.

        Args:
            x: (N, C, H, W).
            kernel: Height and width of a window.
            stride: Pixels between windows; None: `kernel`.

        Returns:
            out (N, C, Ho, Wo), channels_last, and the cache.
        """
        stride = stride or kernel
        rows = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        first, *rest = _window_views(rows, kernel, stride)
        out = first.clone(memory_format=torch.contiguous_format)  # (N, Ho, Wo, C)
        for view in rest:
            torch.maximum(out, view, out=out)
        return out.permute(0, 3, 1, 2), MaxPool2d.Cache(rows, out, kernel, stride)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor]:
        """Return dx (N, C, H, W): the gradient of a window goes to its maximum, of equal ones to the first."""
        dout = dout.permute(0, 2, 3, 1)  # (N, Ho, Wo, C)
        dx = torch.zeros_like(cache.rows, memory_format=torch.contiguous_format)  # (N, H, W, C)
        is_routed = torch.zeros(dout.shape, dtype=torch.bool, device=dout.device)
        views = (_window_views(t, cache.kernel, cache.stride) for t in (cache.rows, dx))
        for value, gradient in zip(*views, strict=True):
            is_maximum = value.eq(cache.out).gt_(is_routed)  # and no earlier one was
            is_routed |= is_maximum
            gradient.addcmul_(dout, is_maximum.to(dout.dtype))
        return (dx.permute(0, 3, 1, 2),)


def _window_views(rows: Tensor, kernel: int, stride: int) -> list[Tensor]:
    """Return a view (N, Ho, Wo, C) of rows (N, H, W, C) for each position within a window."""
    _, h, w, _ = rows.shape
    ho, wo = out_size(h, kernel, stride, 0), out_size(w, kernel, stride, 0)
    return [
        rows[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
