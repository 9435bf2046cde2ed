"""Resolve `base: NAME` in a configuration: its keys are merged over those of another configuration.

Blocks are merged key by key; lists, components with another `name` and durations are replaced. `null` is a value like
any other and removes nothing. All keys are inherited but `name`, since a run is named after its own file.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.config import messages, overrides, strict_yaml
from cvlab.config.strict_yaml import Document, KeyPath
from cvlab.errors import ConfigError

KEY = "base"
MAX_BASES = 8
RULES = ("expect", "expect_fallback")  # they may mention files of the user


def resolve(document: Document, source: Path, find: Callable[[str, Path, str], Path]) -> Document:
    """Return a document merged over the configuration that its `base` names, if it names one.

    A sweep has a block `base`: the configuration of its trials, of which a name alone is short for `from`.

    Args:
        document: The content of a file; what is inherited has marks that name the file it comes from.
        source: The file.
        find: Returns the file that a `base` names, of the reference, the folder it is relative to, and its location.

    Raises:
        ConfigError: The base is missing or not valid, or the bases form a cycle or are more than MAX_BASES.
    """
    return _resolve(document, source, find, (source,))


def _resolve(
    document: Document, source: Path, find: Callable[[str, Path, str], Path], chain: tuple[Path, ...]
) -> Document:
    reference = document.value.get(KEY)
    if KEY not in document.value or isinstance(reference, Mapping):
        return document
    location = document.location((KEY,))
    if not isinstance(reference, str) or not reference.strip():
        shown = messages.format_value(reference)
        raise ConfigError(f"{location}: {KEY}: expected the name or the file of a configuration, got {shown}")
    experiment = document.value.get("experiment")
    if experiment in registry.EXPERIMENTS and KEY in registry.get_experiment(experiment).nested_configs:
        return replace(document, value=document.value | {KEY: {"from": reference}})
    path = find(reference, source.parent, location)
    if any(_is_same(path, other) for other in chain):
        names = " -> ".join(other.name for other in (*chain, path))
        raise ConfigError(f"{location}: {KEY}: {names} is a cycle", f"remove one `{KEY}`")
    if len(chain) > MAX_BASES:
        raise ConfigError(f"{location}: {KEY}: more than {MAX_BASES} bases, one upon the other", "write some keys out")
    other = strict_yaml.read(path)
    if not isinstance(other.value, dict):
        raise ConfigError(f"{location}: {KEY}: {path} has no keys and values at its top")
    other = _resolve(other, path, find, (*chain, path))
    return _merge(other, document, relocate(other.value, path.parent, source.parent))


def _is_same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _merge(base: Document, document: Document, inherited: dict[str, Any]) -> Document:
    """Return a document merged over `base`, whose content is `inherited`, with the marks of both."""
    inherited = {key: value for key, value in inherited.items() if key != "name"}
    changes = {key: value for key, value in document.value.items() if key != KEY}
    marks = {
        path: replace(mark, source=mark.source or base.source)
        for path, mark in base.marks.items()
        if path[:1] != ("name",) and not _is_replaced(path, inherited, changes)
    }
    return Document(overrides.merge(inherited, changes), marks | document.marks, document.source)


def _is_replaced(path: KeyPath, inherited: Any, changes: Any) -> bool:
    """Return whether a document has a value of its own at `path`, or at a part of it that is not merged."""
    for part in path:
        if part not in changes:
            return False
        block = overrides.mergeable_block(str(part), inherited.get(part), changes[part])
        if block is None:
            return True
        inherited, changes = block, changes[part]
    return True


def relocate(value: dict[str, Any], folder: Path, new_folder: Path) -> dict[str, Any]:
    """Return a configuration whose user files and `from`, relative to `folder`, are relative to another folder."""
    if _is_same(folder, new_folder):
        return value

    def new_path(file: str) -> str:
        return Path(os.path.relpath(folder.resolve() / file, new_folder.resolve())).as_posix()

    moved = {file: new_path(file) for file in _user_files(value) if not Path(file).is_absolute()}
    result: dict[str, Any] = _rename(value, moved) if moved else dict(value)
    base = result.get(KEY)  # of a sweep
    if isinstance(base, Mapping) and isinstance(base.get("from"), str) and (folder / base["from"]).is_file():
        result[KEY] = {**base, "from": new_path(base["from"])}
    return result


def _user_files(value: Any) -> Iterator[str]:
    """Yield the files that a value names, at any depth; not those that rules mention."""
    if isinstance(value, str) and registry.is_user_file(value):
        yield value.rpartition(":")[0]
    if isinstance(value, Mapping):
        value = tuple(item for key, item in value.items() if key not in RULES)
    for item in value if isinstance(value, tuple) else ():
        yield from _user_files(item)


def _rename(value: Any, moved: Mapping[str, str]) -> Any:
    """Return a value with other names of files, in rules as well."""
    if isinstance(value, Mapping):
        return {key: _rename(item, moved) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rename(item, moved) for item in value)
    if not isinstance(value, str):
        return value
    names = "|".join(map(re.escape, sorted(moved, key=len, reverse=True)))
    return re.sub(rf"(?<![\w./-])(?:{names})(?=:)", lambda match: moved[match[0]], value)
