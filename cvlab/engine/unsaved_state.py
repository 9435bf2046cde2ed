"""Find what a model remembers from step to step outside its state_dict, so that a resumed run starts without it."""

import hashlib
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_DEPTH = 5  # of containers and objects inside one another
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
STATELESS = (type, types.ModuleType, torch.dtype, torch.device)
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # `training`, the hooks, the registered parameters, buffers, modules


class UnsavedState:
    """Observe a model during its first two steps.

    An attribute is reported if it is a random number generator or changes in the second step. Of those that change in
    the first step only, numbers and booleans are reported, such as a flag `is_initialized`. The others are values that
    are computed once and cached; tensors with a gradient function are results of the forward pass.

    Args:
        model: The model, before its first step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._snapshots = [_snapshot(model)]

    def observe_step(self, is_last: bool) -> list[str] | None:
        """Return the names of the attributes to report after the second step, or after the last; else None."""
        self._snapshots.append(_snapshot(self._model))
        if len(self._snapshots) < 3 and not is_last:
            return None
        before, first, *second = self._snapshots
        generators = {name for name, value in before.items() if value[0] == "generator"}
        switched = {name for name, value in before.items() if value[0] == "number" and first.get(name, value) != value}
        changed = {name for after in second for name, value in after.items() if first.get(name) != value}
        return sorted(generators | switched | changed)


def warning(names: list[str]) -> str:
    """Return the warning about attributes of a model."""
    listed = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = f"attribute {listed} changes" if len(names) == 1 else f"attributes {listed} change"
    return (
        f"warning: the model's {what} during training outside its state_dict, so that a resumed run starts without "
        "this: if later steps depend on it, register a buffer, or draw random numbers from torch's global generator"
    )


def _snapshot(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return a comparable value of every attribute that is not in the state_dict, by its name."""
    values: dict[str, Any] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        values |= {f"{prefix}{key}": value for key, value in _attributes(module)}
        for cls in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
            values |= {f"{cls.__name__}.{key}": value for key, value in vars(cls).items() if not key.startswith("__")}
    fingerprint = _Fingerprint(model)
    fingerprints = {name: fingerprint(value, MAX_DEPTH) for name, value in values.items()}
    return {name: value for name, value in fingerprints.items() if value is not None}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's own attributes, and the buffers that it does not save."""
    yield from ((name, value) for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES)
    yield from ((name, module._buffers[name]) for name in module._non_persistent_buffers_set)


class _Fingerprint:
    """Function of an object that is equal before and after a step if the object's state is.

    Args:
        model: Its parameters and persistent buffers are in checkpoints, so that lists or views of them are no state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = {_storage(tensor) for tensor in (*model.parameters(), *model.state_dict().values())} - {None}
        self._seen: dict[int, Any] = {}  # objects in progress or done, also against endless recursion

    def __call__(self, value: Any, depth: int) -> tuple[Any, ...] | None:
        if value is None or isinstance(value, (str, bytes)):
            return "constant", value
        if isinstance(value, (bool, int, float, complex, np.number, np.bool_)):
            return "number", repr(value)  # NaN is not equal to itself, but its text is
        if isinstance(value, Tensor):
            is_derived = value.grad_fn is not None or _storage(value) in self._saved
            return None if is_derived else ("tensor", _digest(value))
        if isinstance(value, np.ndarray):
            return "array", value.shape, repr(value.tolist())
        if isinstance(value, GENERATORS):
            return "generator", _generator_state(value)
        if isinstance(value, STATELESS) or depth == 0 or id(value) in self._seen:
            return None
        self._seen[id(value)] = value
        return self._of_parts(value, depth - 1)

    def _of_parts(self, value: Any, depth: int) -> tuple[Any, ...] | None:
        if isinstance(value, Mapping):
            return "parts", *((repr(key), self(item, depth)) for key, item in value.items())
        if isinstance(value, (list, tuple, deque)):
            return "parts", *(self(item, depth) for item in value)
        if isinstance(value, (set, frozenset)) or type(value).__module__ == "itertools":
            return "text", repr(value)
        attributes = getattr(value, "__dict__", None)
        return self(attributes, depth) if attributes else None


def _storage(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory, which a view shares; None if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError, ValueError):  # sparse tensors, lazy parameters
        return None


def _digest(tensor: Tensor) -> str:
    description = f"{tuple(tensor.shape)} {tensor.dtype}"
    try:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    except (NotImplementedError, RuntimeError, TypeError):  # sparse tensors, and those without values
        return description
    return f"{description} {hashlib.blake2b(data).hexdigest()}"


def _generator_state(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return _digest(generator.get_state())
    if isinstance(generator, random.SystemRandom):  # it has no state, and every run draws other numbers
        return ""
    if isinstance(generator, random.Random):
        return repr(generator.getstate())
    state = (
        generator.get_state(legacy=False)
        if isinstance(generator, np.random.RandomState)
        else generator.bit_generator.state
    )
    return "".join(f"{key}{np.asarray(value).tolist()}" for key, value in state["state"].items())
