"""Muon: momentum whose matrices are orthogonalized before each step, for filters and hidden weights.

References:
    Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks".

Differences from the paper:
    A weight's Frobenius norm is kept at the square root of its number of rows, as in the 94 % record run of CIFAR-10,
    so that the learning rate is the angle of a step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The coefficients of the quintic polynomial that is steepest at 0; singular values end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, iterations: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Return a matrix with the same singular vectors and singular values near 1, by Newton-Schulz iteration.

    Args:
        matrix: (R, C).
        iterations: Number of iterations.
        dtype: What to compute in, by default the matrix's own dtype; the result has that in any case.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype or matrix.dtype)
    x = x if matrix.shape[0] <= matrix.shape[1] else x.T
    x = x / (x.norm() + 1e-7)  # singular values of at most 1
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for parameter groups with `orthogonal`, Nesterov SGD for the others.

    Args:
        groups: Parameter groups with lr, momentum, weight_decay and orthogonal.
        iterations: See `orthogonalize`.
        dtype: See `orthogonalize`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, iterations: int, dtype: torch.dtype | None = None) -> None:
        self.iterations, self.dtype = iterations, dtype
        super().__init__(groups, {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients: Any = [weight.grad for weight in weights]
            for weight in weights:
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            if group["weight_decay"] > 0:
                gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            buffers = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates: Any = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            if group["orthogonal"]:
                updates = self._orthogonal(weights, updates)
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
        return None

    def _orthogonal(self, weights: Iterable[Tensor], updates: Iterable[Tensor]) -> list[Tensor]:
        """Normalize the weights in place and return their updates orthogonalized, each as a matrix (outputs, ...)."""
        for weight in weights:
            weight.mul_(len(weight) ** 0.5 / weight.norm().clamp(min=1e-12))
        return [orthogonalize(u.reshape(len(u), -1), self.iterations, self.dtype).view_as(u) for u in updates]
