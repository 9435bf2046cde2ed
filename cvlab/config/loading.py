"""YAML < overrides, validated once into a frozen object; every error names its line.

loaded = load("configs/cifar_bn.yaml", ["optimizer.lr=1e-2"])
loaded.config.optimizer.lr
"""

import contextlib
import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cvlab import registry
from cvlab.config import overrides as overrides_
from cvlab.config import profiles, strict_yaml, validation
from cvlab.config.overrides import EXCLUSIVE
from cvlab.config.profiles import AUTO
from cvlab.config.schema import ExperimentConfig
from cvlab.config.strict_yaml import Document, Path_
from cvlab.config.validation import SWEEP
from cvlab.errors import ConfigError

DOTTED = (("grid",), ("zip",), ("search", "space"))  # blocks of a sweep whose keys are dotted themselves


@dataclass(frozen=True)
class Loaded:
    """A valid configuration and the folder that its relative names start from."""

    config: ExperimentConfig
    base: Path
    source: Path
    profiles: Mapping[str, "Loaded"] = field(default_factory=dict)  # by name, where one is still to be chosen
    provenance: Mapping[str, str] = field(default_factory=dict)  # of each dotted key that is no default: file, command


def shipped_folder() -> Path:
    """Return the folder of the configurations that come with cvlab: in the wheel, or in the working copy."""
    package = Path(__file__).parent.parent
    inside = package / "assets" / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """Return the names under which the shipped configurations can be called."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find(reference: str) -> Path:
    """Return the file that a user means by a path, or by the name of a shipped configuration."""
    path = Path(reference)
    with contextlib.suppress(OSError):  # a name longer than the disk allows
        if (path / "config.yaml").is_file():
            return path / "config.yaml"
        if path.is_dir() and path.suffix:
            raise ConfigError(f"{path}: a folder without a config.yaml", "name a YAML file or a run directory")
        if path.exists() and not path.is_dir():  # also a pipe, as in `cvlab train <(...)`
            return path
    name = path.name.removesuffix(".yaml")
    if name in shipped_names() and str(path.parent) in (".", "configs"):
        return shipped_folder() / f"{name}.yaml"
    with_family = (known for known in shipped_names() if known.endswith(f"_{name}"))
    close = next(with_family, None) or registry.closest_match(name, shipped_names())
    hint = f"did you mean {close!r}? " if close else ""
    raise ConfigError(f"no configuration {reference!r}", f"{hint}shipped: {', '.join(shipped_names())}")


def load(reference: str, overrides: Iterable[str] = ()) -> Loaded:
    """Read, override and validate. ConfigError with all problems, each with its place."""
    source = find(reference)
    document = strict_yaml.read(source)
    if not isinstance(document.value, dict):
        raise ConfigError(f"{source}: expected keys and values at the top", "see `cvlab config cifar_bn` for one")
    return _load(document, source, list(overrides))


def _load(document: Document, source: Path, overrides: list[str]) -> Loaded:
    whole = copy.deepcopy(document)
    to_choose = _take_profile(document, overrides)
    given = _apply(document, overrides)
    document.value.setdefault("name", re.sub(r"[^\w.-]+", "-", source.stem).strip("-.")[:60] or "run")
    base = document.value.get("base")
    if document.value.get("experiment") == SWEEP and isinstance(base, dict) and "from" in base:
        document.value["base"] = _inherit(base, source.parent, document.place(("base", "from")))
    config = validate(document, source.parent, given)
    each = {name: _load(copy.deepcopy(whole), source, [*overrides, f"profile={name}"]) for name in to_choose}
    return Loaded(config, source.parent, source, each, provenance(document.value, given))


def provenance(value: Mapping[str, Any], given: Mapping[Path_, str], above: Path_ = ()) -> dict[str, str]:
    """Return where each dotted key of a document comes from: the file, or the command line."""
    found: dict[str, str] = {}
    for key, item in value.items():
        path = (*above, key)
        if isinstance(item, dict):
            found |= provenance(item, given, path)
        else:
            named = any(path[:end] in given for end in range(1, len(path) + 1))
            found[".".join(map(str, path))] = "command line" if named else "file"
    return found


def _take_profile(document: Document, overrides: list[str]) -> list[str]:
    """Lay the named profile over a document; return the names of those to choose from where none is named."""
    known, name = document.value.get("profiles"), profiles.named(document.value, overrides)
    if not isinstance(known, dict) or not known:
        if name not in (AUTO, document.value.get("profile")):
            raise ConfigError(f"override profile={name}: {document.source} has no profiles", "leave it out")
        return []
    if name == AUTO:
        return list(known)
    in_file = name == document.value.get("profile")
    profiles.take(document.value, name, document.place(("profile",)) if in_file else f"override profile={name}")
    return []


def load_sweep(reference: str, overrides: Iterable[str] = ()) -> Loaded:
    """Read a sweep; any other configuration becomes the base of one, whose axes the overrides give."""
    source = find(reference)
    value = strict_yaml.read(source).value
    if not isinstance(value, dict) or value.get("experiment") == SWEEP:
        return load(reference, overrides)
    name = re.sub(r"[^\w.-]+", "-", source.stem).strip("-.")[:50]
    text = yaml.safe_dump({"experiment": SWEEP, "name": f"{name}-sweep", "base": {"from": str(source.resolve())}})
    document = strict_yaml.parse(text, str(source))
    given = _apply(document, overrides)
    document.value["base"] = _inherit(document.value["base"], source.parent, str(source))
    config = validate(document, source.parent, given)
    return Loaded(config, source.parent, source, {}, provenance(document.value, given))


def _inherit(base: dict[str, Any], folder: Path, place: str) -> dict[str, Any]:
    named = base["from"]
    if not isinstance(named, str):
        raise ConfigError(f"{place}: base.from: expected the name of a configuration")
    path = folder / named
    other = strict_yaml.read(path if path.is_file() else find(named)).value
    if not isinstance(other, dict):
        raise ConfigError(f"{place}: {named} has no keys and values at its top")
    if other.get("profiles"):
        name = str(base.get("profile", profiles.named(other)))
        if name == AUTO:
            known = " or ".join(other["profiles"])
            raise ConfigError(f"{place}: comes in several sizes, and a sweep has one", f"set base.profile to {known}")
        profiles.take(other, name, f"{place}: base.profile")
    return overrides_.inherit(base, other)


def _apply(document: Document, overrides: Iterable[str]) -> dict[Path_, str]:
    """Write `a.b=value` into the document; return which path came from which override."""
    given: dict[Path_, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        path: Path_ = tuple(key.strip().split("."))
        for block in DOTTED:
            if path[: len(block)] == block and len(path) > len(block):
                path = (*block, ".".join(map(str, path[len(block) :])))
        if not equals or "" in path:
            raise ConfigError(f"override {text!r} is not of the form key=value", "for example optimizer.lr=1e-2")
        parsed = strict_yaml.parse(value, f"override {text}").value
        block = document.value
        for depth, part in enumerate(path[:-1], start=1):
            if path[:depth] in ((EXCLUSIVE,), ("base", EXCLUSIVE)) and path[:depth] not in given:
                block.pop(part, None)
            if part not in block:
                block[part] = {}
                given[path[:depth]] = text
            block = block[part]
            if not isinstance(block, dict):
                raise ConfigError(f"override {text!r}: {'.'.join(map(str, path[:depth]))} has no keys")
        block[path[-1]] = parsed
        given[path] = text
    return given


def validate(document: Document, base: Path, given: Mapping[Path_, str] | None = None) -> ExperimentConfig:
    """Turn what a file says into its experiment's frozen configuration. ConfigError with every mistake's place."""
    config, wrong = validation.check(document.value, base)
    if wrong:
        lines = [f"{_place(document, path, given or {})}: {message}" for path, message in wrong]
        errors = [ConfigError(line) for line in lines]
        raise ConfigError(errors[0].message, others=tuple(errors[1:]))
    assert config is not None
    return config


def _place(document: Document, path: Path_, given: Mapping[Path_, str]) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in given:
            return f"override {given[path[:end]]}"
    return document.place(path)
