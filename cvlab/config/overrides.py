"""Dotted keys: read, set, and merge nested configuration blocks."""

import copy
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from cvlab.errors import ConfigError

ONE_OF_BLOCK = "duration"  # a block with exactly one key: a new value replaces the whole block
Raw = dict[str, Any]

NOT_INHERITED = ("expect", "expect_fallback", "name")  # keys that belong to a sweep, not to its trials


def put(raw: Raw, key: str, value: Any) -> None:
    """Set the value of a dotted key, creating the blocks above it."""
    *blocks, last = key.split(".")
    for part in blocks:
        block = raw.get(part)
        raw[part] = dict(block) if isinstance(block, Mapping) and part != ONE_OF_BLOCK else {}
        raw = raw[part]
    raw[last] = copy.deepcopy(value)


def get(raw: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, None if there is none."""
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> Raw:
    """Merge one configuration over another.

    A component with another `name`, and a duration, replaces the block of the base instead of being merged with it.
    """
    merged = dict(base)
    for key, value in override.items():
        block = mergeable_block(key, merged.get(key), value)
        merged[key] = value if block is None else merge(block, value)
    return merged


def mergeable_block(key: str, old: Any, value: Any) -> Mapping[str, Any] | None:
    """Return the block `old` if the block `value` is merged with it, None if `value` replaces it."""
    if isinstance(old, str):  # a component that is given by its name alone
        old = {"name": old}
    if not isinstance(old, Mapping) or not isinstance(value, Mapping) or key == ONE_OF_BLOCK:
        return None
    return None if "name" in value and value["name"] != old.get("name") else old


def inherit(base: Mapping[str, Any], other: Mapping[str, Any]) -> Raw:
    """Merge a sweep's base over the configuration that its `from` names, without its name and expectations."""
    inherited = {key: value for key, value in other.items() if key not in NOT_INHERITED}
    return merge(inherited, {key: value for key, value in base.items() if key != "from"})


def to_texts(values: Mapping[str, Any] | Iterable[str] | None) -> list[str]:
    """Return overrides as texts `key=value`.

    Args:
        values: Values by dotted key, texts `key=value`, or None for no overrides.

    Raises:
        ConfigError: A key or a value cannot be written into a configuration.
    """
    if isinstance(values, str):
        values = [values]
    if isinstance(values, Mapping):
        return [f"{key}={to_yaml(value, str(key))}" for key, value in values.items()]
    texts = list(values or ())
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"override {text!r:.80} is not text", "give a dictionary, or texts key=value")
    return texts


def to_yaml(value: Any, key: str) -> str:
    """Return a value of a configuration as one line of YAML. ConfigError if it cannot be written."""
    value = to_plain(value, key)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quote(name)}: {to_yaml(item, key)}" for name, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(to_yaml(item, key) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return _quote(value) if isinstance(value, str) else json.dumps(value)


def _quote(text: str) -> str:
    """Return text in YAML's double quotes, which are JSON's, but for characters beyond 16 bits such as emoji."""
    escaped = (f"\\U{ord(char):08x}" if ord(char) > 0xFFFF else json.dumps(char)[1:-1] for char in text)
    return f'"{"".join(escaped)}"'


def to_plain(value: Any, key: str) -> Any:
    """Return a value with paths as text, sequences as tuples and numbers of numpy and torch as Python's.

    Args:
        value: What a user gives in Python.
        key: Its dotted key, for the error.

    Raises:
        ConfigError: A part of it is nothing that a configuration can hold.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): to_plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(to_plain(item, key) for item in value)
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    raise ConfigError(
        f"{key}: {kind} cannot be written into a configuration",
        "give numbers, text, lists and dictionaries; your own class by its file, `./my_model.py:MyNet`",
    )


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested blocks into dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(item) if isinstance(item, tuple) else item
    return flat
