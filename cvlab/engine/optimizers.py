"""Optimizers by name, with the arguments that a configuration may set.

The signatures are the schema of the `optimizer` block, so that torch is imported where an optimizer is built, not here.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from cvlab import _compat, registry
from cvlab.config.schema import Registry
from cvlab.errors import ConfigError, install_command
from cvlab.registry import unknown_name_error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn, optim

Parameters: TypeAlias = "Iterable[Tensor] | Iterable[dict[str, Any]]"
Rate = Annotated[float, Gt(0), Le(100)]
SummedRate = Annotated[float, Gt(0), Le(10_000)]  # that of a mean loss, where papers sum the loss of a batch
Decay = Annotated[float, Ge(0), Lt(1)]
Momentum = Annotated[float, Gt(0), Lt(1)]
Small = Annotated[float, Ge(0), Le(1)]

_NAMES = ("sgd", "rmsprop", "adam", "adamw", "lion", "muon", "manual_sgd", "manual_rmsprop", "manual_adam")
SCHEDULE_FREE = ("schedule_free_sgd", "schedule_free_adamw")  # average the weights instead of lowering the rate
TORCH_PREFIX = "torch:"
_UNSUPPORTED = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it takes sparse gradients only",
}
_NOT_CONFIGURABLE = ("capturable", "differentiable")  # arguments for CUDA graphs and for gradients through the step


def _resolve(name: str, base: Path) -> Callable[..., Any]:  # noqa: ARG001 - of a registry; there are no user files
    """Return the class of `torch:NAME`, with a signature that a configuration can be checked with."""
    from torch import optim

    classes: Mapping[str, Any] = {
        f"{TORCH_PREFIX}{key}": value
        for key, value in vars(optim).items()
        if inspect.isclass(value) and issubclass(value, optim.Optimizer) and value is not optim.Optimizer
    }
    reason = _UNSUPPORTED.get(name.removeprefix(TORCH_PREFIX))
    if name in classes and reason is not None:
        raise ConfigError(f"optimizer {name}: {reason}", "choose another optimizer")
    if name not in classes:
        known = [*OPTIMIZERS.names, *(key for key in classes if key.removeprefix(TORCH_PREFIX) not in _UNSUPPORTED)]
        raise unknown_name_error("optimizer", name, known)
    optimizer: Any = classes[name]

    def build(*args: Any, **kwargs: Any) -> "optim.Optimizer":
        built: optim.Optimizer = optimizer(*args, **kwargs)
        return built

    build.__doc__ = f"{optimizer.__name__} of torch.optim."
    build.__signature__ = _plain_signature(optimizer)  # type: ignore[attr-defined]
    return build


def _plain_signature(optimizer: Any) -> inspect.Signature:
    """Return the signature of an optimizer of torch without tensors, which YAML does not have."""
    hints = typing.get_type_hints(optimizer.__init__)
    parameters = [
        parameter.replace(annotation=_without_tensors(hints[name]))
        for name, parameter in inspect.signature(optimizer).parameters.items()
        if name not in _NOT_CONFIGURABLE
    ]
    first = parameters[0].replace(name="parameters", annotation=Any)
    return inspect.Signature([first, *parameters[1:]])


def _without_tensors(annotation: Any) -> Any:
    """Return an annotation such as `tuple[float | Tensor, float]` without the tensors."""
    from torch import Tensor

    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return tuple[tuple(map(_without_tensors, arguments))]  # type: ignore[misc]
    if Tensor in arguments:
        return functools.reduce(lambda one, other: one | other, (kind for kind in arguments if kind is not Tensor))
    return annotation


OPTIMIZERS = Registry(
    "optimizer",
    {name: f"cvlab.engine.optimizers:{name}" for name in (*_NAMES, *SCHEDULE_FREE)},
    injected=frozenset({"parameters"}),
    resolve=_resolve,
)


def _has_fused_kernel(parameters: list[Any]) -> bool:
    """Return whether torch has a fused kernel: one for the whole step instead of one per tensor and operation."""
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return first.device.type in ("cpu", "cuda")


def sgd(
    parameters: Parameters, lr: Rate = 1e-2, momentum: Decay = 0.0, nesterov: bool = False, weight_decay: Small = 0.0
) -> "optim.Optimizer":
    """Build stochastic gradient descent with (Nesterov) momentum."""
    from torch import optim

    params: Any = list(parameters)
    return optim.SGD(
        params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=_has_fused_kernel(params)
    )


def prepare_for_skipped_steps(optimizer: "optim.Optimizer") -> None:
    """Let an optimizer start from momentum 0, which is the same step, if the loss is scaled.

    A fused SGD of torch creates its momentum without a value, and keeps it so if the first step is skipped because a
    gradient overflows.
    """
    import torch
    from torch import optim

    if not isinstance(optimizer, optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] > 0 and group["dampening"] == 0:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def rmsprop(
    parameters: Parameters, lr: Rate = 1e-2, decay: Decay = 0.99, eps: Small = 1e-8, weight_decay: Small = 0.0
) -> "optim.Optimizer":
    """Build RMSProp (Tieleman and Hinton, 2012, lecture 6e)."""
    from torch import optim

    return optim.RMSprop(parameters, lr=lr, alpha=decay, eps=eps, weight_decay=weight_decay)


def adam(
    parameters: Parameters,
    lr: Rate = 1e-3,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Small = 1e-8,
    weight_decay: Small = 0.0,
) -> "optim.Optimizer":
    """Build Adam (Kingma and Ba, 2015, algorithm 1)."""
    from torch import optim

    params: Any = list(parameters)
    return optim.Adam(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_has_fused_kernel(params))


def adamw(
    parameters: Parameters,
    lr: Rate = 1e-3,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Small = 1e-8,
    weight_decay: Small = 1e-2,
) -> "optim.Optimizer":
    """Build Adam with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2)."""
    from torch import optim

    params: Any = list(parameters)
    return optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_has_fused_kernel(params))


def lion(
    parameters: Parameters, lr: Rate = 1e-4, betas: tuple[Decay, Decay] = (0.9, 0.99), weight_decay: Small = 0.0
) -> "optim.Optimizer":
    """Build Lion (Chen et al., 2023, algorithm 2) of timm."""
    optimizer: optim.Optimizer = _compat.timm_optimizers().Lion(
        parameters, lr=lr, betas=betas, weight_decay=weight_decay
    )
    return optimizer


def muon(
    parameters: Parameters,
    lr: Rate = 0.24,
    momentum: Decay = 0.6,
    bias_lr: SummedRate = 0.05,
    head_lr: SummedRate = 0.67,
    sgd_momentum: Decay = 0.85,
    weight_decay: Small = 0.0,
    iterations: Annotated[int, Ge(1), Le(20)] = 3,
) -> "optim.Optimizer":
    """Build Muon (Jordan et al., 2024) for filters and hidden weights, Nesterov SGD for biases and the last weight.

    Args:
        parameters: Parameters of a model in order.
        lr: Learning rate of Muon.
        momentum: Momentum of Muon.
        bias_lr: Learning rate of biases and other vectors.
        head_lr: Learning rate of the last weight.
        sgd_momentum: Momentum of biases and the last weight.
        weight_decay: By which fraction a step at the full rate shrinks biases and the last weight, whatever their
            learning rates, before momentum.
        iterations: Newton-Schulz iterations.
    """
    import torch

    from cvlab.engine import device
    from cvlab.engine.muon import Muon

    params: list[Any] = list(parameters)
    weights = [parameter for parameter in params if parameter.ndim > 1]
    biases = [parameter for parameter in params if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": weights[:-1], "lr": lr, "momentum": momentum, "orthogonal": True}]
    for group, rate in ((biases, bias_lr), (weights[-1:], head_lr)):
        groups.append({"params": group, "lr": rate, "momentum": sgd_momentum, "weight_decay": weight_decay / rate})
    dtype = torch.bfloat16 if device.fast_bfloat16(params[0].device) and params[0].dtype == torch.float32 else None
    return Muon(groups, iterations=iterations, dtype=dtype)


def schedule_free_sgd(
    parameters: Parameters, lr: Rate = 1.0, momentum: Momentum = 0.9, weight_decay: Small = 0.0
) -> "optim.Optimizer":
    """Build schedule-free SGD (Defazio et al., 2024, algorithm 1) of the package schedulefree."""
    return _schedule_free("SGDScheduleFree", parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def schedule_free_adamw(
    parameters: Parameters,
    lr: Rate = 2.5e-3,
    betas: tuple[Momentum, Decay] = (0.9, 0.999),
    eps: Small = 1e-8,
    weight_decay: Small = 0.0,
) -> "optim.Optimizer":
    """Build schedule-free AdamW (Defazio et al., 2024, algorithm 1 with Adam) of the package schedulefree."""
    return _schedule_free("AdamWScheduleFree", parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _schedule_free(name: str, parameters: Parameters, **arguments: Any) -> "optim.Optimizer":
    """Return an optimizer of the package schedulefree, in training mode. ConfigError if it is not installed."""
    try:
        import schedulefree
    except ModuleNotFoundError as error:
        raise ConfigError(
            "optimizer: the package schedulefree is not installed", f"`{install_command('schedulefree')}`"
        ) from error
    optimizer: Any = getattr(schedulefree, name)(parameters, **arguments)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def averages_weights(optimizer: "optim.Optimizer") -> bool:
    """Whether an optimizer is schedule-free: `eval` replaces the weights by their average, `train` restores them.

    The weights after both are equal to the ones before up to rounding only.
    """
    return callable(getattr(optimizer, "eval", None))


def manual_sgd(parameters: Parameters, lr: Rate = 1e-2, momentum: Decay = 0.0) -> "optim.Optimizer":
    """Build SGD with momentum from the hand-written update rule."""
    from cvlab.engine import update_rules

    return update_rules.ManualOptimizer(parameters, update_rules.momentum, lr=lr, momentum=momentum)


def manual_rmsprop(
    parameters: Parameters, lr: Rate = 1e-2, decay: Decay = 0.99, eps: Small = 1e-8
) -> "optim.Optimizer":
    """Build RMSProp from the hand-written update rule."""
    from cvlab.engine import update_rules

    return update_rules.ManualOptimizer(parameters, update_rules.rmsprop, lr=lr, decay=decay, eps=eps)


def manual_adam(
    parameters: Parameters, lr: Rate = 1e-3, betas: tuple[Decay, Decay] = (0.9, 0.999), eps: Small = 1e-8
) -> "optim.Optimizer":
    """Build Adam from the hand-written update rule."""
    from cvlab.engine import update_rules

    return update_rules.ManualOptimizer(parameters, update_rules.adam, lr=lr, betas=betas, eps=eps)


def build_optimizer(name: str, model: "nn.Module", arguments: dict[str, Any]) -> "optim.Optimizer":
    """Return an optimizer of the parameters of a model that require gradients.

    Args:
        name: One of `OPTIMIZERS`, or `torch:NAME`.
        model: The model.
        arguments: Arguments of the builder.

    Raises:
        ConfigError: The optimizer rejects an argument.
    """
    _compat.skip_dynamo()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    builder = registry.import_name(OPTIMIZERS.names[name]) if name in OPTIMIZERS.names else _resolve(name, Path())
    try:
        optimizer: optim.Optimizer = builder(trainable, **arguments)
    except (ValueError, RuntimeError) as error:  # RuntimeError: a fused or foreach implementation that does not exist
        raise ConfigError(f"optimizer {name}: {str(error).splitlines()[0]}") from error
    _apply_lr_factors(optimizer, model)
    return optimizer


def _apply_lr_factors(optimizer: "optim.Optimizer", model: "nn.Module") -> None:
    """Split the groups of an optimizer by the factors of the learning rate in `model.lr_factors`, if it has some."""
    factors: dict[str, float] = getattr(model, "lr_factors", None) or {}
    for prefix, factor in factors.items():
        scale_lr(optimizer, (value for name, value in model.named_parameters() if name.startswith(prefix)), factor)


def scale_lr(optimizer: "optim.Optimizer", parameters: "Iterable[Tensor]", factor: float) -> None:
    """Multiply the learning rate of some parameters, splitting the groups that have others too."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        scaled = [parameter for parameter in group["params"] if id(parameter) in chosen]
        rest = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if scaled and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": scaled, "lr": group["lr"] * factor})
        elif scaled:
            group["lr"] *= factor
