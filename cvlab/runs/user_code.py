"""Copy the user's Python files into a run directory, so that the run can be repeated from it alone."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cvlab import registry
from cvlab.config.schema import ExperimentConfig
from cvlab.errors import RunDirError

Config = TypeVar("Config", bound=ExperimentConfig)
IGNORED_KEYS = ("expect", "expect_fallback")  # rules may mention files, but name none to be copied


def copy_user_code(config: Config, base: Path, folder: Path) -> Config:
    """Copy the files that a configuration names into a folder; return the configuration that names the copies."""
    changed = {}
    for key in type(config).model_fields:
        block = getattr(config, key)
        name = getattr(block, "name", None)
        if isinstance(name, str) and registry.is_user_file(name):
            changed[key] = block.model_copy(update={"name": _copy_named_file(name, base, folder)})
    return config.model_copy(update=changed) if changed else config


def user_files(value: Any) -> Iterator[Path]:
    """Yield the files that a value of a configuration names, at any depth, relative to the configuration."""
    if isinstance(value, str) and registry.is_user_file(value):
        yield Path(value.rpartition(":")[0])
    if isinstance(value, Mapping):
        value = [part for key, part in value.items() if key not in IGNORED_KEYS]
    for part in value if isinstance(value, (tuple, list)) else ():
        yield from user_files(part)


def copy_path(path: Path) -> Path:
    """Return the relative path of a file's copy, which never leads out of the folder of the copies.

    It depends on the path alone: `net.py` stays, `../net.py` becomes `_up/net.py`, `/home/me/net.py` becomes
    `_root/home/me/net.py`.
    """
    return Path(*("_up" if part == ".." else "_root" if part == path.anchor else part for part in path.parts))


def snapshot_user_code(value: Any, base: Path, folder: Path) -> None:
    """Copy the files that a value names into a folder, each to its `copy_path`."""
    for path in user_files(value):
        try:
            for source, copy in _files_and_copies(path, base, folder):
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(source.read_bytes())
        except OSError as error:
            raise RunDirError(f"{base / path}: cannot be copied to {folder}: {error.strerror}") from error


def rewrite_paths(config: Config) -> Config:
    """Return a configuration with the names of the copies of `snapshot_user_code`, also in its expectations."""
    values = config.model_dump()
    moved = {str(path): f"./{copy_path(path).as_posix()}" for path in user_files(values) if copy_path(path) != path}

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            for old, new in moved.items():
                value = value.replace(f"{old}:", f"{new}:")
            return value
        if isinstance(value, Mapping):
            return {key: rename(part) for key, part in value.items()}
        return tuple(map(rename, value)) if isinstance(value, (tuple, list)) else value

    return type(config).model_validate(rename(values)) if moved else config


def is_unchanged(value: Any, base: Path, copies: Path) -> bool:
    """Return whether the files that a value names are unchanged since `snapshot_user_code`."""
    try:
        return all(
            source.read_bytes() == copy.read_bytes()
            for path in user_files(value)
            for source, copy in _files_and_copies(path, base, copies)
        )
    except OSError:
        return False


def digest(config: ExperimentConfig, folder: Path) -> str:
    """Return the digest of the user's files that a configuration names, and of those that they import."""
    content = hashlib.blake2b(digest_size=16)
    for path in user_files(config.model_dump()):
        for source, _ in _files_and_copies(path, folder, folder):
            with contextlib.suppress(OSError):  # what is missing fails when it is imported
                content.update(source.name.encode() + source.read_bytes())
    return content.hexdigest()


def _files_and_copies(path: Path, base: Path, folder: Path) -> list[tuple[Path, Path]]:
    """Return a user's file and those of its folder that it imports, each with where its copy goes."""
    source, copy = base / path, folder / copy_path(path)
    return [(source, copy), *((source.parent / name, copy.parent / name) for name in registry.local_imports(source))]


def _copy_named_file(name: str, base: Path, folder: Path) -> str:
    """Copy a file and those of its folder that it imports, which keep their names; return the name of the copy."""
    file, _, attribute = name.rpartition(":")
    source = base / file
    for imported in registry.local_imports(source):
        target = folder / imported
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.read_bytes() != (source.parent / imported).read_bytes():
            raise RunDirError(f"{source.parent / imported}: another file of the run has this name", "rename it")
        target.write_bytes((source.parent / imported).read_bytes())
    return f"./{copy_file(source, folder)}:{attribute}"


def copy_file(source: Path, folder: Path) -> str:
    """Copy a file into a folder under its name, with a number if another file has that name; return the name."""
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
