"""Profiles: one classification experiment in several sizes, of which one is chosen by name or by measuring.

`profile: NAME` is merged over the file before the overrides are applied. `profile: auto` measures at the start which
profiles fit into the time budget, and uses the largest that completes the number of epochs it asks for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from cvlab import registry
from cvlab.config import overrides, strict_yaml
from cvlab.config.schema import FrozenModel, NonNegativeFloat
from cvlab.errors import ConfigError

AUTO = "auto"  # measure at the start which profile fits into the budget


class Profile(FrozenModel):
    """One size of an experiment."""

    epochs: NonNegativeFloat = Field(description="chosen if the budget is enough for this many epochs")
    set: dict[str, Any] = Field({}, description="dotted keys and their values, merged over the file")


def named_profile(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> str:
    """Return the profile that the last override, or else the configuration, names."""
    texts = [text for text in overrides if text.partition("=")[0].strip() == "profile"]
    if not texts:
        return str(raw.get("profile", AUTO))
    return str(strict_yaml.parse_override(texts[-1].partition("=")[2], f"override {texts[-1]}"))


def apply_profile(raw: dict[str, Any], name: str, location: str) -> None:
    """Merge one profile over a configuration, in place, and remove the others.

    Raises:
        ConfigError: if there is no profile of this name.
    """
    known = raw["profiles"]
    if name not in known:
        raise ConfigError(f"{location}: {registry.unknown_name_error('profile', name, [AUTO, *known])}")
    changes = known[name].get("set", {}) if isinstance(known[name], Mapping) else {}
    for key, value in changes.items() if isinstance(changes, Mapping) else ():
        overrides.put(raw, str(key), value)
    del raw["profiles"]
    raw["profile"] = name


def expand_profiles(raw: dict[str, Any], overrides: Sequence[str], location: Callable[[str], str]) -> Sequence[str]:
    """Apply the profile that is named; return one override for each profile if none is (`auto`)."""
    known, name = raw.get("profiles"), named_profile(raw, overrides)
    in_file = name == raw.get("profile")
    if not isinstance(known, dict) or not known:
        if name != AUTO and not in_file:
            raise ConfigError(
                f"{location('experiment')}: override profile={name}: no profiles are defined", "remove it"
            )
        return ()
    if name == AUTO:
        return [f"profile={profile}" for profile in known]
    apply_profile(raw, name, location("profile") if in_file else f"override profile={name}")
    return ()
