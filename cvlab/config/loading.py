"""YAML < overrides, validated once into a frozen object; every error names its line.

loaded = load("configs/cifar_bn.yaml", ["optimizer.lr=1e-2"])
loaded.config.optimizer.lr
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab import registry
from cvlab.config import overrides as config_overrides
from cvlab.config import strict_yaml, validation
from cvlab.config.overrides import EXCLUSIVE
from cvlab.config.schema import ExperimentConfig
from cvlab.config.strict_yaml import Document, Path_
from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from cvlab.experiments.base import Experiment

DOTTED = (("grid",), ("zip",), ("search", "space"))  # blocks of a sweep whose keys are dotted themselves


@dataclass(frozen=True)
class Loaded:
    """A valid configuration and the folder that its relative names start from."""

    config: ExperimentConfig
    base: Path
    source: Path
    variants: Mapping[str, "Loaded"] = field(default_factory=dict)  # by override, if one is chosen at the start
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
    return load_document(document, source, list(overrides))


def load_document(document: Document, source: Path, overrides: Sequence[str]) -> Loaded:
    """Apply overrides to a document that was read from `source`, resolve `from:`, and validate.

    Raises:
        ConfigError: with all problems, each with its file and line.
    """
    original = copy.deepcopy(document)
    experiment = _experiment(document)
    variants = experiment.expand(document.value, overrides, _place_of(document)) if experiment else ()
    given = _apply(document, overrides)
    document.value.setdefault("name", run_name(source, 60) or "run")
    for key in experiment.nested_configs if experiment else ():
        block = document.value.get(key)
        if isinstance(block, dict) and "from" in block:
            document.value[key] = _inherit(block, source.parent, document.place((key, "from")), key)
    config = validate(document, source.parent, given)
    each = {text: load_document(copy.deepcopy(original), source, [*overrides, text]) for text in variants}
    return Loaded(config, source.parent, source, each, provenance(document.value, given))


def run_name(source: Path, longest: int) -> str:
    """Return a file's name as the name of a run, of at most `longest` characters."""
    return re.sub(r"[^\w.-]+", "-", source.stem).strip("-.")[:longest]


def _experiment(document: Document) -> "Experiment[Any] | None":
    """Return the experiment that a document names; None if there is no such experiment, which validation reports."""
    name = document.value.get("experiment")
    return registry.get_experiment(name) if name in registry.EXPERIMENTS else None


def _place_of(document: Document) -> Callable[[str], str]:
    return lambda key: document.place((key,))


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


def _inherit(block: dict[str, Any], folder: Path, place: str, key: str) -> dict[str, Any]:
    """Return a nested configuration, merged over the configuration that its `from` names."""
    reference = block["from"]
    if not isinstance(reference, str):
        raise ConfigError(f"{place}: {key}.from: expected the name of a configuration")
    path = folder / reference
    document = strict_yaml.read(path if path.is_file() else find(reference))
    if not isinstance(document.value, dict):
        raise ConfigError(f"{place}: {reference} has no keys and values at its top")
    experiment = _experiment(document)
    if experiment is not None:
        chosen = [f"{name}={value}" for name, value in block.items() if isinstance(value, str) and name != "from"]
        variants = experiment.expand(document.value, chosen, lambda name: f"{place}: {key}.{name}")
        if variants:
            options = " or ".join(f"{key}.{text}" for text in variants)
            raise ConfigError(f"{place}: {reference} comes in several variants, of which a sweep takes one", options)
    return config_overrides.inherit(block, document.value)


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
        raise ConfigError(errors[0].message, further_errors=tuple(errors[1:]))
    assert config is not None
    return config


def _place(document: Document, path: Path_, given: Mapping[Path_, str]) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in given:
            return f"override {given[path[:end]]}"
    return document.place(path)
