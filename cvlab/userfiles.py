"""The user's own Python files, brought into a run directory, so that the run can be repeated from it alone."""

import itertools
from collections.abc import Iterator, Mapping
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


UNTOLD = ("expect", "expect_standin")  # rules may speak of files, but name none to be copied


def named(value: Any) -> Iterator[Path]:
    """Yield the files that a value of a configuration names, however deep, relative to the configuration."""
    if isinstance(value, str) and lookup.is_user_file(value):
        yield Path(value.rpartition(":")[0])
    if isinstance(value, Mapping):
        value = [part for key, part in value.items() if key not in UNTOLD]
    for part in value if isinstance(value, (tuple, list)) else ():
        yield from named(part)


def mirror(value: Any, base: Path, folder: Path) -> None:
    """Copy the files that a value names below a folder, each at its own relative path, so that the names still hold."""
    for path in named(value):
        if not path.is_absolute() and ".." not in path.parts:
            try:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes((base / path).read_bytes())
            except OSError as error:
                raise RunDirError(f"{base / path}: cannot be copied to {folder}: {error.strerror}") from error


def same_files(value: Any, one: Path, other: Path) -> bool:
    """Whether the files that a value names are the same below two folders."""
    try:
        return all((one / path).read_bytes() == (other / path).read_bytes() for path in named(value))
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
