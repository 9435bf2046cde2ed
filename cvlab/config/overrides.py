"""Dotted keys: read, set, and merge nested configuration blocks."""

import copy
from collections.abc import Mapping
from typing import Any

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
        old = merged.get(key)
        are_blocks = isinstance(old, Mapping) and isinstance(value, Mapping) and key != ONE_OF_BLOCK
        is_other = are_blocks and "name" in value and value["name"] != old.get("name")  # type: ignore[union-attr]
        merged[key] = merge(old, value) if are_blocks and not is_other else value  # type: ignore[arg-type]
    return merged


def inherit(base: Mapping[str, Any], other: Mapping[str, Any]) -> Raw:
    """Merge a sweep's base over the configuration that its `from` names, without its name and expectations."""
    inherited = {key: value for key, value in other.items() if key not in NOT_INHERITED}
    return merge(inherited, {key: value for key, value in base.items() if key != "from"})
