"""A strict reader for small YAML files that records the position of every value.

Differences from `yaml.safe_load`: duplicate keys, anchors, aliases, tags and multiple documents are rejected, `1e-3` is
a number, `yes` and `on` are text, sequences become tuples, and size, depth and the number of nodes are bounded. Events
are read one at a time with an explicit stack, so that no input can exhaust the stack of Python or of the C parser.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cvlab.errors import ConfigError, DataError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_NODES = 600
MAX_BRACKETS = 400  # PyYAML's scanner takes quadratic time over unclosed ones
INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z")
FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")
CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}
for _word in ("null", "true", "false"):
    CONSTANTS[_word.capitalize()] = CONSTANTS[_word.upper()] = CONSTANTS[_word]
CONSTANTS |= {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}

FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast; its messages are terser

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mark:
    """A position in a file, counted from 1; `source` is the file if it is not the document's."""

    line: int
    column: int
    source: str = ""


@dataclass
class Document:
    """The content of a file; `marks` has the position of each value by its path of keys and indices."""

    value: Any
    marks: dict[KeyPath, Mark]
    source: str

    def location(self, path: KeyPath) -> str:
        """Return `file:line:column` of the value at `path`, or of its nearest ancestor."""
        mark = self.mark(path)
        return f"{mark.source or self.source}:{mark.line}:{mark.column}" if mark else self.source

    def mark(self, path: KeyPath) -> Mark | None:
        """Return the position of the value at `path`, or of its nearest ancestor; None if none is known."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path)


@dataclass
class _Open:
    """A mapping or sequence that is still being read."""

    path: KeyPath
    items: Any
    key: str | None = None
    seen: set[str] = field(default_factory=set)


def read(path: Path, loader: Any = yaml.SafeLoader) -> Document:
    """Read a YAML file with one of PyYAML's parsers.

    Raises:
        DataError: if it cannot be read.
        ConfigError: if it is not a valid configuration file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "name a configuration file that can be read") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES // 1024} KiB", "a configuration is a page of text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text", "save the file as UTF-8") from error
    return parse(text, str(path), loader)


def parse(text: str, source: str, loader: Any = yaml.SafeLoader) -> Document:
    """Parse one YAML document.

    Raises:
        ConfigError: with `source:line:column`, if it is not valid.
    """
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise ConfigError(f"{source}: more than {MAX_BRACKETS} brackets", "a configuration is a page of text")
    try:
        return _build(text, source, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{location}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error


def _build(text: str, source: str, loader: Any) -> Document:
    document = Document(None, {}, source)
    stack: list[_Open] = []
    documents = 0
    for event in yaml.parse(text, Loader=loader):
        mark = _mark(event)
        location = f"{source}:{mark.line}:{mark.column}"
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ConfigError(f"{location}: a second document", "one file holds one configuration")
        elif isinstance(event, yaml.NodeEvent):
            _reject_unsupported(event, location)
            _add(document, stack, event, location)
        elif isinstance(event, yaml.CollectionEndEvent):
            _close(document, stack)
    return document


def parse_override(text: str, source: str) -> Any:
    """Parse the value of an override: as `parse`, but ` #` starts no comment, and is a part of plain text."""
    if " #" in text and text.lstrip()[:1] not in ("[", "{", '"', "'"):
        return text.strip()
    return parse(text, source).value


def _mark(event: yaml.Event) -> Mark:
    start = event.start_mark
    assert start is not None
    return Mark(start.line + 1, start.column + 1)


def _reject_unsupported(event: yaml.NodeEvent, location: str) -> None:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise ConfigError(f"{location}: anchors and aliases are not allowed", "write the value out")
    tag = getattr(event, "tag", None)
    if tag not in (None, "!"):
        raise ConfigError(f"{location}: the tag {tag!r} is not allowed", "write a plain value")


def _add(document: Document, stack: list[_Open], event: yaml.NodeEvent, location: str) -> None:
    """Add a scalar or the start of a collection: as a key, as a value or as the whole document."""
    top = stack[-1] if stack else None
    if top is not None and isinstance(top.items, dict) and top.key is None:
        top.key = _key(top, event, location)
        document.marks[(*top.path, top.key)] = _mark(event)
        return
    path: KeyPath = ()
    if top is not None:
        path = (*top.path, top.key if isinstance(top.items, dict) else len(top.items))  # type: ignore[arg-type]
    if top is None or isinstance(top.items, list):
        document.marks[path] = _mark(event)
    if len(document.marks) > MAX_NODES:
        raise ConfigError(f"{location}: more than {MAX_NODES} values", "a configuration is a page of text")
    if isinstance(event, yaml.ScalarEvent):
        _put(document, top, _scalar(event, location))
        return
    if len(stack) >= MAX_DEPTH:
        raise ConfigError(f"{location}: nested deeper than {MAX_DEPTH} levels", "a configuration is flat")
    stack.append(_Open(path, {} if isinstance(event, yaml.MappingStartEvent) else []))


def _key(top: _Open, event: yaml.NodeEvent, location: str) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise ConfigError(f"{location}: a key must be a word", "quote it if it is text")
    if event.value in top.seen:
        raise ConfigError(f"{location}: duplicate key {event.value!r}", "keep one of the two")
    top.seen.add(event.value)
    return str(event.value)


def _put(document: Document, top: _Open | None, value: Any) -> None:
    if top is None:
        document.value = value
    elif isinstance(top.items, list):
        top.items.append(value)
    else:
        top.items[top.key] = value
        top.key = None


def _close(document: Document, stack: list[_Open]) -> None:
    closed = stack.pop()
    value = tuple(closed.items) if isinstance(closed.items, list) else closed.items
    _put(document, stack[-1] if stack else None, value)


def _scalar(event: yaml.ScalarEvent, location: str) -> Any:
    """Resolve a plain scalar by YAML 1.2's core schema; quoted text stays text."""
    text = str(event.value)
    if event.style or event.tag == "!":  # of plain text it is None, or '' from libyaml
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.match(text):
        if len(text) > 19:
            raise ConfigError(f"{location}: the number {text[:12]}... is too large", "at most 18 digits")
        return int(text)
    return float(text.replace("_", "")) if FLOAT.match(text) else text
