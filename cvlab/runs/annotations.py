"""What a user notes about a run: tags, a note and a star, in `annotations.json` of the run directory."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cvlab.errors import ConfigError, RunDirError
from cvlab.runs.records import read_json
from cvlab.storage import atomic
from cvlab.storage.lock import exclusive

FILE = "annotations.json"
LOCK = ".runs.lock"  # in the folder of the runs: held while annotations change
LOCK_SECONDS = 10.0
MAX_TAG_CHARS, MAX_NOTE_CHARS, MAX_TAGS = 60, 10_000, 100


@dataclass(frozen=True)
class Annotations:
    """What a user has noted about a run."""

    tags: tuple[str, ...] = ()
    note: str = ""
    starred: bool = False


def read(path: Path) -> Annotations:
    """Return the annotations of a run; RunDirError if their file is damaged."""
    from cvlab.runs import schemas

    record = read_json(path / FILE)
    if schemas.invalid_key(schemas.Annotations, record) is not None:
        raise RunDirError(f"{path / FILE}: not the annotations of a run", "the file was changed; remove it")
    return Annotations(tuple(record.get("tags", ())), record.get("note", ""), record.get("starred", False))


def check_tag(tag: str) -> str:
    """Return a tag without surrounding spaces; ConfigError if it could not be written in a query."""
    tag = tag.strip()
    if not tag or len(tag) > MAX_TAG_CHARS or not tag.isprintable() or any(c in " |=<>!~\"'," for c in tag):
        raise ConfigError(
            f"tag {tag[: MAX_TAG_CHARS + 1]!r}: a tag is one word of at most {MAX_TAG_CHARS} characters",
            "without spaces, commas, quotes and | = < > ! ~",
        )
    return tag


def update(path: Path, change: Callable[[Annotations], Annotations]) -> Annotations:
    """Change the annotations of a run; changes by several processes do not overwrite each other.

    Args:
        path: The run directory.
        change: Returns the new annotations for the current ones.

    Raises:
        RunDirError: The file cannot be written, or it is damaged.
        ConfigError: The note is too long, or there are too many tags.
    """
    with exclusive(path.parent / LOCK, LOCK_SECONDS):
        current = read(path)
        changed = change(current)
        if len(changed.note) > MAX_NOTE_CHARS or len(changed.tags) > MAX_TAGS:
            raise ConfigError(f"a run has at most {MAX_TAGS} tags and a note of {MAX_NOTE_CHARS} characters")
        if changed != current:
            atomic.write_text(path / FILE, json.dumps(asdict(changed), indent=2) + "\n")
    return changed


def with_tags(current: Annotations, added: tuple[str, ...], removed: tuple[str, ...]) -> Annotations:
    """Return annotations with tags added and removed; the order of the others stays."""
    tags = dict.fromkeys((*current.tags, *added))
    for tag in removed:
        tags.pop(tag, None)
    return replace(current, tags=tuple(tags))
