"""The user's own Python files, brought into a run directory, so that the run can be repeated from it alone."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cvlab import registry
from cvlab.config.schema import ExperimentConfig
from cvlab.errors import RunDirError

Config = TypeVar("Config", bound=ExperimentConfig)


def copy_user_code(chosen: Config, base: Path, folder: Path) -> Config:
    """Copy the files that a configuration names into a folder, and return it with the names of the copies."""
    changed = {}
    for key in type(chosen).model_fields:
        block = getattr(chosen, key)
        name = getattr(block, "name", None)
        if isinstance(name, str) and registry.is_user_file(name):
            changed[key] = block.model_copy(update={"name": _bring_one(name, base, folder)})
    return chosen.model_copy(update=changed) if changed else chosen


UNTOLD = ("expect", "expect_fallback")  # rules may speak of files, but name none to be copied


def named(value: Any) -> Iterator[Path]:
    """Yield the files that a value of a configuration names, however deep, relative to the configuration."""
    if isinstance(value, str) and registry.is_user_file(value):
        yield Path(value.rpartition(":")[0])
    if isinstance(value, Mapping):
        value = [part for key, part in value.items() if key not in UNTOLD]
    for part in value if isinstance(value, (tuple, list)) else ():
        yield from named(part)


def inside(path: Path) -> Path:
    """Return where a copy of a file lies below a folder: at its own relative path, or at one that leads nowhere else.

    A function of the path alone: `net.py` stays, `../net.py` becomes `_up/net.py`, `/home/me/net.py`
    `_root/home/me/net.py`.
    """
    return Path(*("_up" if part == ".." else "_root" if part == path.anchor else part for part in path.parts))


def snapshot_user_code(value: Any, base: Path, folder: Path) -> None:
    """Copy the files that a value names below a folder, each to its place `inside`."""
    for path in named(value):
        try:
            (folder / inside(path)).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside(path)).write_bytes((base / path).read_bytes())
        except OSError as error:
            raise RunDirError(f"{base / path}: cannot be copied to {folder}: {error.strerror}") from error


def rewrite_paths(chosen: Config) -> Config:
    """Return a configuration whose names, also those in its expectations, are those of the copies of `mirror`."""
    dumped = chosen.model_dump()
    moved = {str(path): f"./{inside(path)}" for path in named(dumped) if inside(path) != path}

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            for old, new in moved.items():
                value = value.replace(f"{old}:", f"{new}:")
            return value
        if isinstance(value, Mapping):
            return {key: rename(part) for key, part in value.items()}
        return tuple(map(rename, value)) if isinstance(value, (tuple, list)) else value

    return type(chosen).model_validate(rename(dumped)) if moved else chosen


def same_files(value: Any, base: Path, copies: Path) -> bool:
    """Whether the files that a value names are still those that `mirror` has copied."""
    try:
        return all((base / path).read_bytes() == (copies / inside(path)).read_bytes() for path in named(value))
    except OSError:
        return False


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
