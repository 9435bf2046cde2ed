"""Which parameters of a model are trained, and at which learning rates, by patterns of their names."""

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cvlab.engine import optimizers
from cvlab.engine.config import TrainConfig
from cvlab.errors import ConfigError
from cvlab.registry import closest_match


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Freeze parameters of a model as the configuration says; return the optimizer of the others.

    Raises:
        ConfigError: A pattern matches no parameter, none is left to train, or the optimizer rejects an argument.
    """
    freeze(model, config.freeze)
    optimizer = optimizers.build_optimizer(config.optimizer.name, model, config.optimizer.builder_arguments())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern, factor in config.lr_factors.items():
        parameters = [trained[name] for name in _matches("lr_factors", pattern, trained)]
        optimizers.scale_lr(optimizer, parameters, factor)
    return optimizer


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters from training; `set_train_mode` leaves the statistics of frozen normalizations as they are.

    A normalization is frozen if all of its parameters are, or if a pattern matches its statistics.

    Args:
        model: Changed in place.
        patterns: Patterns of names of parameters, as in file names: `*`, `?`, `[abc]`.

    Raises:
        ConfigError: A pattern matches no parameter, or none is left to train.
    """
    if not patterns:
        return
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        for name in _matches("freeze", pattern, parameters):
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("freeze: no parameter is left to train", "freeze fewer")
    frozen = []
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is None:
            continue
        weights = list(module.parameters(recurse=False))
        statistics = f"{name}.running_mean" if name else "running_mean"
        is_matched = any(fnmatch.fnmatchcase(statistics, pattern) for pattern in patterns)
        if is_matched or (weights and not any(weight.requires_grad for weight in weights)):
            frozen.append(name)
    model.frozen_norms = frozen  # type: ignore[assignment]


def set_train_mode(model: nn.Module) -> None:
    """Set a model to training mode, but its frozen normalizations to evaluation mode."""
    model.train()
    names: list[str] = getattr(model, "frozen_norms", [])
    for name in names:
        model.get_submodule(name).eval()


def _matches(key: str, pattern: str, names: Mapping[str, object]) -> list[str]:
    """Return the names that a pattern matches. Raises ConfigError if there is none."""
    if matches := [name for name in names if fnmatch.fnmatchcase(name, pattern)]:
        return matches
    prefixes = {name[: end + 1] + "*" for name in names for end, letter in enumerate(name) if letter == "."}
    close = closest_match(pattern, sorted(prefixes) if "*" in pattern else list(names))
    hint = f"did you mean {close!r}?" if close else f"the first ones are {', '.join(list(names)[:4])}"
    noun = "parameter" if key == "freeze" else "parameter that is trained"
    raise ConfigError(f"{key}: {pattern!r} matches no {noun}", hint)
