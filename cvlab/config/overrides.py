"""Dotted keys: read, set, and merge nested configuration blocks."""

import copy
from collections.abc import Mapping
from typing import Any

EXCLUSIVE = "duration"  # a block of which exactly one key is given: a new one replaces it whole


Raw = dict[str, Any]

NOT_INHERITED = ("expect", "expect_fallback", "name")  # what a sweep says of itself, and no run of it


def put(raw: Raw, key: str, value: Any) -> None:
    """Set a dotted key, making the blocks above it."""
    *above, last = key.split(".")
    for part in above:
        block = raw.get(part)
        raw[part] = dict(block) if isinstance(block, Mapping) and part != EXCLUSIVE else {}
        raw = raw[part]
    raw[last] = copy.deepcopy(value)


def get(raw: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, None where there is none."""
    found: Any = raw
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Raw:
    """Lay one configuration over another; a block that names another part, or a duration, replaces the one below."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        blocks = isinstance(old, Mapping) and isinstance(value, Mapping) and key != EXCLUSIVE
        renamed = blocks and "name" in value and value["name"] != old.get("name")  # type: ignore[union-attr]
        merged[key] = merge(old, value) if blocks and not renamed else value  # type: ignore[arg-type]
    return merged


def inherit(base: Mapping[str, Any], other: Mapping[str, Any]) -> Raw:
    """Lay a sweep's base over the configuration that its `from` names; its name and expectations are not inherited."""
    below = {key: value for key, value in other.items() if key not in NOT_INHERITED}
    return merge(below, {key: value for key, value in base.items() if key != "from"})
