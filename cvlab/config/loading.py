"""Load a configuration: a YAML file and overrides, validated once into a frozen object.

    loaded = load("configs/cifar_bn.yaml", ["optimizer.lr=1e-2"])
    loaded.config.optimizer.lr

Errors name the file and line of every invalid value.
"""

import contextlib
import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab import registry
from cvlab.config import inheritance, strict_yaml, validation
from cvlab.config import overrides as config_overrides
from cvlab.config.overrides import ONE_OF_BLOCK
from cvlab.config.schema import ExperimentConfig
from cvlab.config.strict_yaml import Document, KeyPath
from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from cvlab.experiments.base import Experiment


@dataclass(frozen=True)
class Loaded:
    """A valid configuration.

    Attributes:
        config: The validated configuration.
        base: The folder that its relative paths start from.
        source: The file it was read from.
        variants: By override, if the experiment chooses one of them when it starts.
        provenance: `file`, `base NAME` or `command line` for each dotted key that is not a default.
    """

    config: ExperimentConfig
    base: Path
    source: Path
    variants: Mapping[str, "Loaded"] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def require_one_variant(self) -> None:
        """Raise ConfigError if the configuration comes in variants of which none is chosen."""
        if self.variants:
            raise ConfigError(f"{self.source.name} comes in several variants", f"add {' or '.join(self.variants)}")


def shipped_folder() -> Path:
    """Return the folder of the shipped configurations, in the wheel or in the working copy."""
    package = Path(__file__).parent.parent
    inside = package / "assets" / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find(reference: str) -> Path:
    """Return the file of a path, of a run directory, or of a shipped configuration by name.

    Raises:
        ConfigError: if there is none, with the closest name.
    """
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
    with_family = next((known for known in shipped_names() if known.endswith(f"_{name}")), None)
    if with_family:
        raise ConfigError(f"unknown configuration {reference!r}", f"did you mean {with_family!r}?")
    error = registry.unknown_name_error("configuration", name, shipped_names(), "cvlab config")
    raise ConfigError(f"unknown configuration {reference!r}", error.hint)


def load(reference: str, overrides: Iterable[str] = ()) -> Loaded:
    """Read a configuration, apply overrides and validate it.

    Args:
        reference: A path, a run directory, or the name of a shipped configuration.
        overrides: `key=value` texts with dotted keys; the last one wins.

    Raises:
        ConfigError: with all problems, each with its file and line.
    """
    source = find(reference)
    document = strict_yaml.read(source)
    if not isinstance(document.value, dict):
        raise ConfigError(f"{source}: expected keys and values at the top", "see `cvlab config cifar_bn` for one")
    return load_document(document, source, list(overrides))


def resolve_base(document: Document, source: Path) -> Document:
    """Return a document that was read from `source`, merged over the configuration that its `base` names, if any."""
    return inheritance.resolve(document, source, _find_base)


def _find_base(reference: str, folder: Path, location: str) -> Path:
    """Return the file that a `base` names: a path relative to `folder`, or the name of a shipped configuration."""
    path = folder / reference
    with contextlib.suppress(OSError, ValueError):  # a name that no disk takes
        if path.is_dir():
            raise ConfigError(f"{location}: base: {path} is a folder", "name a YAML file")
        if path.name == "config.yaml" and any((path.parent / name).exists() for name in ("env.json", "status.json")):
            # its code, if it has any, may be that of others
            raise ConfigError(f"{location}: base: {path} belongs to a run", "copy it out of the run directory")
        if path.is_file():
            return path
    if reference in shipped_names():
        return shipped_folder() / f"{reference}.yaml"
    known = [*(file.name for file in folder.glob("*.yaml")), *shipped_names()]
    close = f"{reference}.yaml" if f"{reference}.yaml" in known else registry.closest_match(Path(reference).name, known)
    hint = f"a path is relative to {folder}; `cvlab config` lists the names"
    if close is not None and "/" not in reference:
        hint = f"did you mean {close!r}?"
    raise ConfigError(f"{location}: base: no configuration {reference!r:.80}", hint)


def load_document(document: Document, source: Path, overrides: Sequence[str]) -> Loaded:
    """Resolve the `base` of a document that was read from `source`, apply overrides, resolve `from:`, and validate.

    Raises:
        ConfigError: with all problems, each with its file and line.
    """
    document = resolve_base(document, source)
    original = copy.deepcopy(document)
    experiment = _experiment(document)
    variants = experiment.expand(document.value, overrides, _location_of(document)) if experiment else ()
    sources = _apply(document, overrides, experiment)
    document.value.setdefault("name", run_name(source, 60) or "run")
    for key in experiment.nested_configs if experiment else ():
        block = document.value.get(key)
        if isinstance(block, dict) and "from" in block:
            document.value[key] = _inherit(block, source.parent, document.location((key, "from")), key)
    config = validate(document, source.parent, sources)
    each = {text: load_document(copy.deepcopy(original), source, [*overrides, text]) for text in variants}
    return Loaded(config, source.parent, source, each, provenance(document, sources, source.parent))


def run_name(source: Path, longest: int) -> str:
    """Return a file's name as the name of a run, of at most `longest` characters."""
    return re.sub(r"[^\w.-]+", "-", source.stem).strip("-.")[:longest]


def _experiment(document: Document) -> "Experiment[Any] | None":
    """Return the experiment that a document names; None if there is no such experiment, which validation reports."""
    name = document.value.get("experiment")
    return registry.get_experiment(name) if name in registry.EXPERIMENTS else None


def _location_of(document: Document) -> Callable[[str], str]:
    return lambda key: document.location((key,))


def provenance(document: Document, sources: Mapping[KeyPath, str], folder: Path) -> dict[str, str]:
    """Return for each dotted key of a document where it comes from.

    Args:
        document: The document.
        sources: The override of each path that has one.
        folder: The folder of the document, from which the names of other files start.

    Returns:
        `command line`, `file`, or `base NAME` with the shipped configuration or the file that it is inherited from.
    """
    origins: dict[str, str] = {}
    for path in _leaves(document.value):
        mark = document.mark(path)
        if any(path[:end] in sources for end in range(1, len(path) + 1)):
            origin = "command line"
        elif mark is not None and mark.source:
            origin = f"base {_base_name(Path(mark.source), folder)}"
        else:
            origin = "file"
        origins[".".join(map(str, path))] = origin
    return origins


def _leaves(value: Mapping[str, Any], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, (*prefix, key))
        else:
            yield (*prefix, key)


def _base_name(path: Path, folder: Path) -> str:
    return path.stem if path.parent == shipped_folder() else Path(os.path.relpath(path, folder)).as_posix()


def _inherit(block: dict[str, Any], folder: Path, location: str, key: str) -> dict[str, Any]:
    """Return a nested configuration, merged over the configuration that its `from` names."""
    reference = block["from"]
    if not isinstance(reference, str):
        raise ConfigError(f"{location}: {key}.from: expected the name of a configuration")
    path = folder / reference
    path = path if path.is_file() else find(reference)
    document = strict_yaml.read(path)
    if not isinstance(document.value, dict):
        raise ConfigError(f"{location}: {reference} has no keys and values at its top")
    document = resolve_base(document, path)
    experiment = _experiment(document)
    if experiment is not None:
        overrides = [f"{name}={value}" for name, value in block.items() if isinstance(value, str) and name != "from"]
        variants = experiment.expand(document.value, overrides, lambda name: f"{location}: {key}.{name}")
        if variants:
            options = " or ".join(f"{key}.{text}" for text in variants)
            raise ConfigError(f"{location}: {reference} comes in several variants, of which a sweep takes one", options)
    return config_overrides.inherit(block, inheritance.relocate(document.value, path.parent, folder))


def _apply(document: Document, overrides: Iterable[str], experiment: "Experiment[Any] | None") -> dict[KeyPath, str]:
    """Write `a.b=value` into the document; return the override that each path came from."""
    dotted_blocks = experiment.dotted_blocks if experiment else ()
    one_of_blocks = [(ONE_OF_BLOCK,), *((key, ONE_OF_BLOCK) for key in experiment.nested_configs)] if experiment else []
    sources: dict[KeyPath, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        for dotted in dotted_blocks:
            if path[: len(dotted)] == dotted and len(path) > len(dotted):
                path = (*dotted, ".".join(map(str, path[len(dotted) :])))
        if not equals or "" in path:
            raise ConfigError(f"override {text!r} is not of the form key=value", "for example optimizer.lr=1e-2")
        parsed = _from_current_folder(strict_yaml.parse_override(value, f"override {text}"))
        block = document.value
        for depth, part in enumerate(path[:-1], start=1):
            if path[:depth] in one_of_blocks and path[:depth] not in sources:
                block.pop(part, None)
            if part not in block:
                block[part] = {}
                sources[path[:depth]] = text
            if isinstance(block[part], str):  # a block that is given by its name alone
                block[part] = {"name": block[part]}
            block = block[part]
            if not isinstance(block, dict):
                raise ConfigError(f"override {text!r}: {'.'.join(map(str, path[:depth]))} has no keys")
        block[path[-1]] = parsed
        sources[path] = text
    return sources


def _from_current_folder(value: Any) -> Any:
    """Make the user's files in a value absolute: what is typed is relative to the current folder."""
    if isinstance(value, str) and registry.is_user_file(value):
        return os.path.abspath(value)
    if isinstance(value, dict):
        return {key: _from_current_folder(item) for key, item in value.items()}
    return tuple(map(_from_current_folder, value)) if isinstance(value, tuple) else value


def validate(document: Document, base: Path, sources: Mapping[KeyPath, str] | None = None) -> ExperimentConfig:
    """Return the frozen configuration of a document.

    Raises:
        ConfigError: with all problems, each with its file and line or its override.
    """
    config, problems = validation.check(document.value, base)
    if problems:
        lines = [f"{_location(document, path, sources or {})}: {message}" for path, message in problems]
        errors = [ConfigError(line) for line in lines]
        raise ConfigError(errors[0].message, further_errors=tuple(errors[1:]))
    assert config is not None
    return config


def _location(document: Document, path: KeyPath, sources: Mapping[KeyPath, str]) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in sources:
            return f"override {sources[path[:end]]}"
    return document.location(path)
