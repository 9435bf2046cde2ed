"""Weights with their metadata: safetensors in float16 with a JSON object in the header."""

import json
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from cvlab.errors import DataError
from cvlab.storage import atomic

Metadata = TypeVar("Metadata")


def save(path: Path, key: str, metadata: dict[str, Any], model: nn.Module) -> None:
    """Write the weights of a model, those in floating point as float16.

    Args:
        path: The file.
        key: Name of the metadata in the header.
        metadata: What the weights belong to, as plain values.
        model: The model.

    Raises:
        RunDirError: The file or folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    halves = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}
    raw = to_bytes(halves, {key: json.dumps(metadata, ensure_ascii=True)})
    atomic.write(path, lambda file: file.write(raw))


def read(path: Path, key: str, kind: type[Metadata], subject: str, hint: str) -> tuple[Metadata, dict[str, Tensor]]:
    """Read a file that `save` has written.

    Args:
        path: The file.
        key: Name of the metadata in the header.
        kind: Class of the metadata; its fields are the keys of the JSON object.
        subject: What the file should hold, for messages: "a detector".
        hint: What to do if it does not.

    Returns:
        The metadata, and the weights by name.

    Raises:
        DataError: The file is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path}: no such file", hint)
    try:
        with safe_open(path, "pt") as file:
            raw = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        fields = json.loads(raw) if raw else None
        # JSON has no tuples
        metadata = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}) if fields else None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not {subject} that can be read: {error}", hint) from error
    if metadata is None:
        raise DataError(f"{path}: does not say what it is", hint)
    return metadata, tensors


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path, hint: str) -> None:
    """Load weights into a model for evaluation: eval mode, no gradients.

    Args:
        model: The model.
        tensors: Weights by name.
        path: Where they were read from, for messages.
        hint: What to do if they do not fit.

    Raises:
        DataError: Names or shapes differ from the model's.
    """
    expected = model.state_dict()
    wrong = [name for name in expected if name not in tensors or tensors[name].shape != expected[name].shape]
    if wrong or tensors.keys() != expected.keys():
        raise DataError(f"{path}: its weights do not fit its metadata: {(wrong or sorted(tensors))[0]}", hint)
    model.load_state_dict(tensors)
    model.eval().requires_grad_(False)
