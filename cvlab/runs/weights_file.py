"""Weights in a file that says what they are: safetensors in float16, with an object of JSON in its header."""

import json
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from cvlab.errors import DataError
from cvlab.storage import atomic

About = TypeVar("About")


def save(path: Path, key: str, about: dict[str, Any], net: nn.Module) -> None:
    """Write a net's weights and what they are. RunDirError where the disk refuses."""
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    halves = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}
    raw = to_bytes(halves, {key: json.dumps(about, ensure_ascii=True)})
    atomic.write(path, lambda file: file.write(raw))


def read(path: Path, key: str, kind: type[About], what: str, hint: str) -> tuple[About, dict[str, Tensor]]:
    """Read what the weights of a file of `save` are, as a `kind`, and the weights. DataError where it is not `what`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path}: no such file", hint)
    try:
        with safe_open(path, "pt") as file:
            raw = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        told = json.loads(raw) if raw else None
        # JSON knows no tuples
        about = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}) if told else None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not {what} that can be read: {error}", hint) from error
    if about is None:
        raise DataError(f"{path}: does not say what it is", hint)
    return about, tensors


def fill(net: nn.Module, tensors: dict[str, Tensor], path: Path, hint: str) -> None:
    """Put weights into a net, for evaluation. DataError unless they are its own by name and shape."""
    own = net.state_dict()
    wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    if wrong or tensors.keys() != own.keys():
        raise DataError(f"{path}: its weights do not fit what it says it is: {(wrong or sorted(tensors))[0]}", hint)
    net.load_state_dict(tensors)
    net.eval().requires_grad_(False)
