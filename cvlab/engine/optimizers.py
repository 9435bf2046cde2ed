"""Optimisers and learning-rate schedules by name, with the parameters that a YAML may set."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, optim

from cvlab import registry
from cvlab.config.schema import Registry
from cvlab.engine import device, update_rules
from cvlab.engine.muon import Muon
from cvlab.errors import ConfigError

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
Rate = Annotated[float, Gt(0), Le(100)]
Decay = Annotated[float, Ge(0), Lt(1)]
Small = Annotated[float, Ge(0), Le(1)]

_NAMES = ("sgd", "rmsprop", "adam", "adamw", "muon", "manual_sgd", "manual_rmsprop", "manual_adam")
OPTIMIZERS = Registry(
    "optimizer",
    {name: f"cvlab.engine.optimizers:{name}" for name in _NAMES},
    supplied=frozenset({"parameters"}),
)


def _fused(parameters: list[Any]) -> bool:
    """One kernel per step instead of one per tensor and operation, where torch has it."""
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return first.device.type in ("cpu", "cuda")


def sgd(
    parameters: Parameters, lr: Rate = 1e-2, momentum: Decay = 0.0, nesterov: bool = False, weight_decay: Small = 0.0
) -> optim.Optimizer:
    """Stochastic gradient descent, with (Nesterov) momentum if it is above 0."""
    given: Any = list(parameters)
    return optim.SGD(given, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=_fused(given))


def rmsprop(
    parameters: Parameters, lr: Rate = 1e-2, decay: Decay = 0.99, eps: Small = 1e-8, weight_decay: Small = 0.0
) -> optim.Optimizer:
    """RMSProp (Tieleman and Hinton, 2012, lecture 6e): the gradient over its running root mean square."""
    return optim.RMSprop(parameters, lr=lr, alpha=decay, eps=eps, weight_decay=weight_decay)


def adam(
    parameters: Parameters,
    lr: Rate = 1e-3,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Small = 1e-8,
    weight_decay: Small = 0.0,
) -> optim.Optimizer:
    """Adam (Kingma and Ba, 2015, algorithm 1), with bias correction."""
    given: Any = list(parameters)
    return optim.Adam(given, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_fused(given))


def adamw(
    parameters: Parameters,
    lr: Rate = 1e-3,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Small = 1e-8,
    weight_decay: Small = 1e-2,
) -> optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2)."""
    given: Any = list(parameters)
    return optim.AdamW(given, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_fused(given))


def muon(
    parameters: Parameters,
    lr: Rate = 0.24,
    momentum: Decay = 0.6,
    bias_lr: Rate = 0.05,
    head_lr: Rate = 0.67,
    sgd_momentum: Decay = 0.85,
    weight_decay: Small = 0.0,
    iterations: Annotated[int, Ge(1), Le(20)] = 3,
) -> optim.Optimizer:
    """Muon (Jordan et al., 2024) for filters and hidden weights; Nesterov SGD for biases and the last weight.

    `lr` and `momentum` are Muon's; biases take `bias_lr`, the last weight `head_lr`, both `sgd_momentum`.
    """
    given: list[Any] = list(parameters)
    weights = [parameter for parameter in given if parameter.ndim > 1]
    shared = {"momentum": sgd_momentum, "weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": weights[:-1], "lr": lr, "momentum": momentum, "orthogonal": True},
        {"params": [parameter for parameter in given if parameter.ndim < 2], "lr": bias_lr, **shared},
        {"params": weights[-1:], "lr": head_lr, **shared},
    ]
    dtype = torch.bfloat16 if device.fast_bfloat16(given[0].device) and given[0].dtype == torch.float32 else None
    return Muon(groups, iterations=iterations, dtype=dtype)


def manual_sgd(parameters: Parameters, lr: Rate = 1e-2, momentum: Decay = 0.0) -> optim.Optimizer:
    """Apply the hand-written rule of SGD with momentum."""
    return update_rules.ManualOptimizer(parameters, update_rules.momentum, lr=lr, momentum=momentum)


def manual_rmsprop(parameters: Parameters, lr: Rate = 1e-2, decay: Decay = 0.99, eps: Small = 1e-8) -> optim.Optimizer:
    """Apply the hand-written rule of RMSProp."""
    return update_rules.ManualOptimizer(parameters, update_rules.rmsprop, lr=lr, decay=decay, eps=eps)


def manual_adam(
    parameters: Parameters, lr: Rate = 1e-3, betas: tuple[Decay, Decay] = (0.9, 0.999), eps: Small = 1e-8
) -> optim.Optimizer:
    """Apply the hand-written rule of Adam."""
    return update_rules.ManualOptimizer(parameters, update_rules.adam, lr=lr, betas=betas, eps=eps)


def build_optimizer(name: str, model: torch.nn.Module, arguments: dict[str, Any]) -> optim.Optimizer:
    """Return the optimizer called `name` over the parameters of `model` that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        made: optim.Optimizer = registry.get("optimizer", name, OPTIMIZERS.names)(trained, **arguments)
    except ValueError as error:
        raise ConfigError(f"optimizer {name}: {error}") from error
    return made
