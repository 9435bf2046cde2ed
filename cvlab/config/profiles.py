"""An experiment in several sizes: a named one is laid over the file, before the overrides."""

from collections.abc import Iterable, Mapping
from typing import Any

from cvlab import registry
from cvlab.config import overrides
from cvlab.errors import ConfigError

AUTO = "auto"  # measure at the start which profile fits into the budget


def named(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> str:
    """Return the profile that a configuration names, or the last override of it."""
    given = [text.partition("=")[2].strip() for text in overrides if text.partition("=")[0].strip() == "profile"]
    return given[-1] if given else str(raw.get("profile", AUTO))


def take(raw: dict[str, Any], name: str, place: str) -> None:
    """Lay a profile over a configuration, in place, and leave the others out; ConfigError where there is none."""
    known = raw["profiles"]
    if name not in known:
        raise ConfigError(f"{place}: {registry.unknown_name_error('profile', name, [AUTO, *known])}")
    changes = known[name].get("set", {}) if isinstance(known[name], Mapping) else {}
    for key, value in changes.items() if isinstance(changes, Mapping) else ():
        overrides.put(raw, str(key), value)
    del raw["profiles"]
    raw["profile"] = name
