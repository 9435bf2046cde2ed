"""YAML < overrides, validated once into a frozen object; every error names its line.

loaded = load("configs/cifar_bn.yaml", ["optimizer.lr=1e-2"])
loaded.config.optimizer.lr
"""

import contextlib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from cvlab import expect, experiments, explain, lookup, yamlfile
from cvlab.errors import ConfigError, CvlabError
from cvlab.schema import Frozen, Part, RunConfig, part_type, tables_of
from cvlab.yamlfile import Document, Path_

EXCLUSIVE = "duration"  # a block of which exactly one key is given: an override replaces it whole


@dataclass(frozen=True)
class Loaded:
    """A valid configuration and the folder that its relative names start from."""

    config: RunConfig
    base: Path
    source: Path


def shipped_folder() -> Path:
    """Return the folder of the configurations that come with cvlab: in the wheel, or in the working copy."""
    package = Path(__file__).parent
    inside = package / "shipped"
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
    close = lookup.nearest(name, shipped_names())
    hint = f"did you mean {close!r}? " if close else ""
    raise ConfigError(f"no configuration {reference!r}", f"{hint}shipped: {', '.join(shipped_names())}")


def load(reference: str, overrides: Iterable[str] = ()) -> Loaded:
    """Read, override and validate. ConfigError with all problems, each with its place."""
    source = find(reference)
    document = yamlfile.read(source)
    if not isinstance(document.value, dict):
        raise ConfigError(f"{source}: expected keys and values at the top", "see `cvlab config cifar_bn` for one")
    given = _apply(document, overrides)
    document.value.setdefault("name", re.sub(r"[^\w.-]+", "-", source.stem).strip("-.")[:60] or "run")
    config = validate(document, source.parent, given)
    return Loaded(config, source.parent, source)


def _apply(document: Document, overrides: Iterable[str]) -> dict[Path_, str]:
    """Write `a.b=value` into the document; return which path came from which override."""
    given: dict[Path_, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        path: Path_ = tuple(key.strip().split("."))
        if not equals or "" in path:
            raise ConfigError(f"override {text!r} is not of the form key=value", "for example optimizer.lr=1e-2")
        parsed = yamlfile.parse(value, f"override {text}").value
        block = document.value
        for depth, part in enumerate(path[:-1], start=1):
            if path[:depth] == (EXCLUSIVE,) and path[:depth] not in given:
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


def validate(document: Document, base: Path, given: Mapping[Path_, str] | None = None) -> RunConfig:
    """Turn what a file says into its experiment's frozen configuration."""
    raw = document.value
    given = given or {}
    config_type, wrong = _config_type(raw, base)
    try:
        if config_type is not None:
            config = typing.cast(RunConfig, config_type.model_validate(raw))
    except ValidationError as error:
        named = {path[:1] for path, _ in wrong}
        found = explain.problems(error, config_type or Frozen, raw)
        wrong += [(path, message) for path, message in found if path[:1] not in named]
    if not wrong:
        wrong = _unknown_metrics(config)
    if wrong:
        lines = [f"{_place(document, path, given)}: {message}" for path, message in wrong]
        errors = [ConfigError(line) for line in lines]
        raise ConfigError(errors[0].message, others=tuple(errors[1:]))
    return config


def _unknown_metrics(config: RunConfig) -> list[tuple[Path_, str]]:
    """Find expectations that speak of what the experiment does not measure."""
    known = experiments.find(config.experiment).metric_names(config)
    wrong: list[tuple[Path_, str]] = []
    for key in ("expect", "expect_standin"):
        for index, rule in enumerate(getattr(config, key)):
            for metric in expect.metrics_of(rule):
                if metric not in known:
                    close = lookup.nearest(metric, known)
                    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(sorted(known))}"
                    wrong.append(((key, index), f"{rule!r}: no metric {metric!r}; {hint}"))
    return wrong


def _place(document: Document, path: Path_, given: Mapping[Path_, str]) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in given:
            return f"override {given[path[:end]]}"
    return document.place(path)


def _config_type(raw: Mapping[str, Any], base: Path) -> tuple[type[Frozen] | None, list[tuple[Path_, str]]]:
    """Find the experiment's schema and put the schema of each named block into it; report unknown names."""
    name = raw.get("experiment")
    if not isinstance(name, str):
        known = ", ".join(experiments.names())
        return None, [(("experiment",), f"missing key 'experiment'; known: {known}")]
    try:
        config_type: type[Frozen] = experiments.find(name).Config
    except ConfigError as error:
        return None, [(("experiment",), str(error))]
    fields: dict[str, Any] = {}
    wrong: list[tuple[Path_, str]] = []
    for key, table in tables_of(config_type).items():
        info = config_type.model_fields[key]
        block = raw.get(key)
        chosen = block.get("name") if isinstance(block, Mapping) else getattr(info.default, "name", None)
        if not isinstance(chosen, str):
            if isinstance(block, Mapping):
                wrong.append(((key, "name"), f"{key}.name: give one of {', '.join(sorted(table.names))}"))
            continue
        try:
            made = part_type(table, chosen, table.find(chosen, base))
        except CvlabError as error:
            wrong.append(((key, "name"), str(error)))
            continue
        fields[key] = (made, ... if info.is_required() else _default(made))
    return create_model(config_type.__name__, __base__=config_type, __doc__=config_type.__doc__, **fields), wrong


def _default(made: type[Part]) -> Any:
    """Build a block from its defaults, or say that it must be given where a key of it has none."""
    required = any(field.is_required() for field in made.model_fields.values())
    return ... if required else made(name=made.model_fields["name"].default)
