"""The user's own Python files, brought into a run directory, so that the run can be repeated from it alone."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from cvlab import lookup
from cvlab.errors import RunDirError
from cvlab.schema import AnyConfig

Config = TypeVar("Config", bound=AnyConfig)


def bring(chosen: Config, base: Path, folder: Path) -> Config:
    """Copy the files that a configuration names into a folder, and return it with the names of the copies."""
    changed = {}
    for key in type(chosen).model_fields:
        block = getattr(chosen, key)
        name = getattr(block, "name", None)
        if isinstance(name, str) and lookup.is_user_file(name):
            changed[key] = block.model_copy(update={"name": _bring_one(name, base, folder)})
    return chosen.model_copy(update=changed) if changed else chosen


def bring_raw(raw: Mapping[str, Any], base: Path, folder: Path) -> dict[str, Any]:
    """Do the same for a configuration that is not validated yet."""
    brought = dict(raw)
    for key, block in raw.items():
        name = block.get("name") if isinstance(block, Mapping) else None
        if isinstance(name, str) and lookup.is_user_file(name):
            brought[key] = {**block, "name": _bring_one(name, base, folder)}
    return brought


def _bring_one(name: str, base: Path, folder: Path) -> str:
    file, _, attribute = name.rpartition(":")
    return f"./{copy_beside(base / file, folder)}:{attribute}"


def copy_beside(source: Path, folder: Path) -> str:
    """Copy a file into a folder under its own name, or with a number where another file has that; return the name."""
    try:
        content = source.read_bytes()
        for number in itertools.count(1):
            name = source.name if number == 1 else f"{source.stem}_{number}{source.suffix}"
            target = folder / name
            if not target.exists():
                target.write_bytes(content)
                return name
            if target.read_bytes() == content:
                return name
    except OSError as error:
        raise RunDirError(f"{source}: cannot be copied to {folder}: {error.strerror}") from error
    raise AssertionError
