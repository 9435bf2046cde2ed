"""Training losses of classifiers by name. Each is a mean over the images of a batch, optionally weighted.

A builder returns the loss; its parameters are the keys of the `loss` block. Labels are classes (N,), or probabilities
of classes (N, K) of mixtures.
"""

from typing import TYPE_CHECKING, Annotated, TypeAlias

from annotated_types import Ge, Gt, Le

from cvlab.config.schema import FractionBelowOne, Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ClassLoss: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None], Tensor]"  # logits, labels, weights of images (N,)

SVM = "svm"
CROSS_ENTROPY = "cross_entropy"
LOSSES = Registry(
    "loss",
    {name: f"cvlab.experiments.classification.losses:{name}" for name in (CROSS_ENTROPY, "bce", "focal", SVM)},
    injected=frozenset({"label_smoothing"}),
)


def cross_entropy(label_smoothing: FractionBelowOne = 0.0) -> ClassLoss:
    """Build the cross-entropy of the softmax."""
    import torch.nn.functional as F

    def loss(logits: "Tensor", labels: "Tensor", weights: "Tensor | None") -> "Tensor":
        if weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return _mean(F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing), weights)

    return loss


def bce(label_smoothing: FractionBelowOne = 0.0) -> ClassLoss:
    """Build the binary cross-entropy of each class against the rest, summed over classes (Wightman et al., 2021)."""
    import torch.nn.functional as F

    def loss(logits: "Tensor", labels: "Tensor", weights: "Tensor | None") -> "Tensor":
        targets = _targets(logits, labels, label_smoothing)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)  # (N,)
        return _mean(losses, weights)

    return loss


def focal(gamma: Annotated[float, Ge(0), Le(10)] = 2.0, label_smoothing: FractionBelowOne = 0.0) -> ClassLoss:
    """Build the focal loss of the softmax, (1 - p)^gamma times the cross-entropy (Lin et al., 2017, equation 4)."""
    import torch.nn.functional as F

    def loss(logits: "Tensor", labels: "Tensor", weights: "Tensor | None") -> "Tensor":
        log_p = F.log_softmax(logits, 1)
        # 1 - p, from above: at p = 1 the gradient of a power below 1 is infinite
        rest = (1 - log_p.exp()).clamp(min=1e-7)
        losses = -(_targets(logits, labels, label_smoothing) * rest**gamma * log_p).sum(1)  # (N,)
        return _mean(losses, weights)

    return loss


def svm(margin: Annotated[float, Gt(0), Le(100)] = 1.0) -> ClassLoss:
    """Build the multi-class SVM loss of `cvlab.layers`, with its hand-written gradient (Weston and Watkins, 1999)."""
    from cvlab.layers import losses, modules

    def loss(logits: "Tensor", labels: "Tensor", weights: "Tensor | None") -> "Tensor":
        return modules.apply_layer(losses.SVM, logits, labels, options=(margin, weights))

    return loss


def _targets(logits: "Tensor", labels: "Tensor", label_smoothing: float) -> "Tensor":
    """Return probabilities of classes (N, K), mixed with the uniform distribution."""
    import torch.nn.functional as F

    targets = F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
    return targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]


def _mean(losses: "Tensor", weights: "Tensor | None") -> "Tensor":
    """Return the mean over N images; not torch's weighted mean, whose divisor differs between batches and ranks."""
    return losses.mean() if weights is None else (weights * losses).mean()
