"""Softmax cross-entropy and the multi-class SVM loss, forward and backward. After EECS 498, assignment 2."""

import torch
from torch import Tensor


class Softmax:
    """Mean over the batch of -log softmax(logits)[label]; ln C before training."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the cross-entropy.

        Args:
            logits: (N, C).
            labels: int64 (N,).

        Returns:
            loss, a scalar, and the cache.
        """
        shifted = logits - logits.max(1, keepdim=True).values  # (N, C), so that exp cannot overflow
        log_p = shifted - shifted.exp().sum(1, keepdim=True).log()  # (N, C)
        return -log_p.gather(1, labels[:, None]).mean(), (log_p, labels)

    @staticmethod
    def backward(dout: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        """Return dlogits (N, C), (softmax - one-hot) / N, for a scalar dout; None for the labels."""
        log_p, labels = cache
        n = len(labels)
        dlogits = log_p.exp()
        dlogits[torch.arange(n, device=labels.device), labels] -= 1
        return dlogits * (dout / n), None


class SVM:
    """Mean over the batch of the sum over wrong classes of max(0, score - correct score + margin).

    References:
        Weston and Watkins, 1999, "Support vector machines for multi-class pattern recognition".
    """

    @staticmethod
    def forward(
        scores: Tensor, labels: Tensor, margin: float = 1.0, weights: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
        """Return the hinge loss.

        Args:
            scores: (N, C).
            labels: int64 (N,).
            margin: By how much the correct score should be the highest.
            weights: (N,), the weight of each image in the mean; None: 1.

        Returns:
            loss, a scalar, and the cache.
        """
        correct = scores.gather(1, labels[:, None])  # (N, 1)
        margins = (scores - correct + margin).clamp(min=0).scatter(1, labels[:, None], 0.0)  # (N, C)
        weighted = margins if weights is None else margins * weights[:, None]
        return weighted.sum() / len(labels), (margins, labels, weights)

    @staticmethod
    def backward(dout: Tensor, cache: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, None]:
        """Return dscores (N, C) for a scalar dout: over N, 1 for each class within the margin, minus their count."""
        margins, labels, weights = cache
        dscores = (margins > 0).to(margins.dtype)
        dscores.scatter_(1, labels[:, None], -dscores.sum(1, keepdim=True))  # the count stands at the correct class
        if weights is not None:
            dscores *= weights[:, None]
        return dscores * (dout / len(labels)), None
