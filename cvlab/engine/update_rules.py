"""Hand-written update rules of optimizers: SGD with momentum, RMSProp, Adam (EECS 498, assignment 3).

Each rule is a pure function of one weight, its gradient and its state; `ManualOptimizer` makes a torch optimizer of it.
The weights after any number of steps are those of torch.optim up to rounding.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Rule = Callable[..., tuple[Tensor, State]]


def momentum(w: Tensor, dw: Tensor, state: State, lr: float, momentum: float = 0.0) -> tuple[Tensor, State]:
    """Step along the velocity v = momentum * v + dw (Sutskever et al., 2013); plain SGD if momentum is 0."""
    velocity = momentum * state["velocity"] + dw if state else dw.clone()
    return w - lr * velocity, {"velocity": velocity}


def rmsprop(
    w: Tensor, dw: Tensor, state: State, lr: float, decay: float = 0.99, eps: float = 1e-8
) -> tuple[Tensor, State]:
    """Divide the gradient by the root of its running mean square (Tieleman and Hinton, 2012, lecture 6e)."""
    before = state["square"] if state else torch.zeros_like(w)
    square = decay * before + (1 - decay) * dw * dw
    return w - lr * dw / (square.sqrt() + eps), {"square": square}


def adam(
    w: Tensor, dw: Tensor, state: State, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> tuple[Tensor, State]:
    """Divide the gradient's running mean by the root of its running mean square, both bias-corrected.

    Kingma and Ba, 2015, algorithm 1. Without the correction the first steps are (1 - beta1) / sqrt(1 - beta2) = 3.2
    times too long.
    """
    step = state["step"] + 1 if state else 1
    mean = betas[0] * (state["mean"] if state else torch.zeros_like(w)) + (1 - betas[0]) * dw
    square = betas[1] * (state["square"] if state else torch.zeros_like(w)) + (1 - betas[1]) * dw * dw
    mean_hat = mean / (1 - betas[0] ** step)
    square_hat = square / (1 - betas[1] ** step)
    return w - lr * mean_hat / (square_hat.sqrt() + eps), {"step": step, "mean": mean, "square": square}


class ManualOptimizer(torch.optim.Optimizer):
    """An update rule as a torch optimizer, with parameter groups, schedules and checkpoints.

    Args:
        parameters: Parameters or parameter groups.
        rule: Called as `rule(weight, gradient, state, **settings)`; returns the new weight and state.
        settings: Default settings of the groups.
    """

    def __init__(self, parameters: Iterable[Any], rule: Rule, **settings: Any) -> None:
        self.rule = rule
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {key: value for key, value in group.items() if key in self.defaults}
            for weight in group["params"]:
                if weight.grad is not None:
                    updated, self.state[weight] = self.rule(weight, weight.grad, self.state[weight], **settings)
                    weight.copy_(updated)
        return loss
