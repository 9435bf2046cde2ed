"""Softmax cross-entropy and the multi-class SVM loss: value and gradient in one function. EECS 498, assignment 2."""

import torch
from torch import Tensor


class Softmax:
    """Mean over the batch of -log softmax(scores)[label]; ln C at the start of a training."""

    @staticmethod
    def forward(scores: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss, a scalar, for scores (N, C) and int64 labels (N,)."""
        shifted = scores - scores.max(1, keepdim=True).values  # (N, C), so that exp cannot overflow
        log_p = shifted - shifted.exp().sum(1, keepdim=True).log()  # (N, C)
        return -log_p.gather(1, labels[:, None]).mean(), (log_p, labels)

    @staticmethod
    def backward(dout: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        """Return dscores (N, C): (softmax - one hot) / N."""
        log_p, labels = cache
        n = len(labels)
        dscores = log_p.exp()
        dscores[torch.arange(n, device=labels.device), labels] -= 1
        return dscores * (dout / n), None


class SVM:
    """Mean over the batch of sum over wrong classes of max(0, score - right score + 1) (Weston and Watkins, 1999)."""

    @staticmethod
    def forward(scores: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss, a scalar, for scores (N, C) and int64 labels (N,)."""
        right = scores.gather(1, labels[:, None])  # (N, 1)
        margins = (scores - right + 1).clamp(min=0).scatter(1, labels[:, None], 0.0)  # (N, C)
        return margins.sum() / len(labels), (margins, labels)

    @staticmethod
    def backward(dout: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        """Return dscores (N, C): 1 for each class inside the margin, minus their number for the right one, over N."""
        margins, labels = cache
        dscores = (margins > 0).to(margins.dtype)
        dscores.scatter_(1, labels[:, None], -dscores.sum(1, keepdim=True))
        return dscores * (dout / len(labels)), None
