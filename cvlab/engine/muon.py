"""Muon: momentum whose matrices are made orthogonal before each step; filters and hidden weights take it.

Paper: Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks". Differs: a weight's Frobenius
norm is held at the root of its number of rows, as in the 94 % record run of CIFAR-10, so that the learning rate is the
angle of a step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steepest at 0, singular values end between 0.7 and 1.2


def orthogonalize(matrix: Tensor, iterations: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Return a matrix (R, C) with the same singular vectors and all singular values near 1, by Newton and Schulz.

    It is computed in `dtype`, if that is given, and returned in the matrix's own.
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
    """Groups with `orthogonal` take Muon, the others Nesterov SGD; both keep one momentum buffer for each weight."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, iterations: int, dtype: torch.dtype | None = None) -> None:
        """Take groups of parameters; `iterations` and `dtype` are those of `orthogonalize`."""
        self.iterations, self.dtype = iterations, dtype
        super().__init__(groups, {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients: Any = [weight.grad for weight in weights]
            for weight in weights:
                self.state[weight].setdefault("momentum", torch.zeros_like(weight))
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
        """Scale each weight to its norm, and make its update, as a matrix with a row for each output, orthogonal."""
        for weight in weights:
            weight.mul_(len(weight) ** 0.5 / weight.norm().clamp(min=1e-12))
        return [orthogonalize(u.reshape(len(u), -1), self.iterations, self.dtype).view_as(u) for u in updates]
