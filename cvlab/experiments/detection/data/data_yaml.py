"""Read the data.yaml of YOLO's format: the classes, and the folders or lists of the photos of each split.

References: docs.ultralytics.com/datasets/detect. Class names are taken as they are written: `no`, `1e3` and `007` are
names, not values of YAML.
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cvlab.data import files
from cvlab.errors import DataError
from cvlab.experiments.detection.data.annotations import SPLIT_ALIASES, SPLITS, Irregularities

MAX_BYTES = 1_000_000
MAX_BRACKETS = 2_000  # PyYAML's scanner takes quadratic time over unclosed ones
NO_NAME = ("", "~")


@dataclass(frozen=True)
class Entry:
    """A path in the file, and where it is written."""

    text: str
    location: str


@dataclass(frozen=True)
class DataFile:
    """A data.yaml.

    Attributes:
        path: The file.
        names: The classes, by number.
        entries: The folders and lists of each split that the file names.
        root: The folder to which they are relative, if the file names one that exists.
        box_columns: Numbers in a line of a label file behind the class if points follow the box, else None.
        irregularities: What was read otherwise than YAML means it.
    """

    path: Path
    names: tuple[str, ...]
    entries: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    root: Path | None = None
    box_columns: int | None = None
    irregularities: Irregularities = field(default_factory=Irregularities)

    @staticmethod
    def read(path: Path) -> "DataFile":
        """Read a file. DataError if it is not valid, or names no classes."""
        irregularities = Irregularities()
        mapping = _parse(path)
        names = _read_names(path, mapping, irregularities)
        entries: dict[str, tuple[Entry, ...]] = {}
        for split in SPLITS:
            values = [mapping[key] for key in SPLIT_ALIASES[split] if key in mapping]
            paths = tuple(entry for value in values for entry in _paths(path, split, value))
            entries |= {split: paths} if paths else {}
        root = _scalar(mapping.get("path"))
        folder = path.parent / root if root else None
        return DataFile(path, names, entries, folder, _box_columns(mapping), irregularities)

    @staticmethod
    def has_names(path: Path) -> bool:
        """Whether a YAML file names classes; False also if it cannot be read."""
        try:
            return "names" in _parse(path)
        except DataError:
            return False

    def has_split(self, split: str) -> bool:
        """Whether the file names the photos of a split."""
        return split in self.entries


def _parse(path: Path) -> dict[str, yaml.Node]:
    """Return the values of a file's top level by key. DataError with file, line and column if it is not valid."""
    text = files.read_text(path, MAX_BYTES)
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise DataError(f"{path}: more than {MAX_BRACKETS} brackets", "this is not a data.yaml")
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise DataError(f"{location}: not valid YAML: {error.problem or error.context}", "correct it") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{path}: not valid YAML: {str(error).splitlines()[0]}", "correct it") from error
    mapping: dict[str, yaml.Node] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if _scalar(key) in mapping:
            raise DataError(f"{_location(path, key)}: duplicate key {key.value!r}", "keep one of the two")
        mapping[_scalar(key)] = value
    return mapping


def _location(path: Path, node: yaml.Node | None) -> str:
    """Return `file:line:column` of a value, counted from 1."""
    mark = node.start_mark if node is not None else None
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)


def _scalar(node: yaml.Node | None) -> str:
    """Return the text of a value as it is written; empty for a list or mapping."""
    return str(node.value).strip() if isinstance(node, yaml.ScalarNode) else ""


def _read_names(path: Path, mapping: dict[str, yaml.Node], irregularities: Irregularities) -> tuple[str, ...]:
    """Return `names`: a list, or a mapping from numbers without gaps."""
    node = mapping.get("names")
    location = _location(path, node)
    if isinstance(node, yaml.SequenceNode):
        items = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        by_number = {_scalar(key): value for key, value in node.value}
        if len(by_number) != len(node.value) or set(by_number) != {str(k) for k in range(len(by_number))}:
            raise DataError(f"{location}: names are not numbered from 0 without gaps", "write `names: [cat, dog]`")
        items = [by_number[str(k)] for k in range(len(by_number))]
    else:
        items = []
    if not items or not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise DataError(f"{location}: names is no list of classes", "write `names: [cat, dog]`")
    for item in items:
        name = _scalar(item)
        if name in NO_NAME and (item.style is None or not name):
            raise DataError(f"{_location(path, item)}: a class without a name", "name every class")
        if item.style is None and _yaml_value(item.value) != item.value:
            irregularities.add("class names that YAML reads as other values taken as written", _location(path, item))
    count = _scalar(mapping.get("nc"))
    if count.isdecimal() and len(count) < 9 and int(count) != len(items):
        where = _location(path, mapping["nc"])
        raise DataError(f"{where}: nc is {int(count)}, but names has {len(items)} classes", "correct one of the two")
    return tuple(_scalar(item) for item in items)


def _yaml_value(text: str) -> str:
    """Return what YAML makes of a plain word, as text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    is_same_number = isinstance(value, int | float) and not isinstance(value, bool) and str(value) == text
    return text if isinstance(value, str) or is_same_number else repr(value)


def _paths(path: Path, split: str, node: yaml.Node) -> list[Entry]:
    """Return the paths of a split: one, a list of them, or none. DataError if it is something else."""
    nodes = list(node.value) if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in nodes):
        raise DataError(f"{_location(path, node)}: {split} is no path and no list of paths", "name a folder")
    return [Entry(_scalar(item), _location(path, item)) for item in nodes if _scalar(item) not in (*NO_NAME, "null")]


def _box_columns(mapping: dict[str, yaml.Node]) -> int | None:
    """Return the numbers in a line with points behind the box, which `kpt_shape` says, or None."""
    shape = mapping.get("kpt_shape")
    if not isinstance(shape, yaml.SequenceNode) or len(shape.value) != 2:
        return None
    counts = [_scalar(item) for item in shape.value]
    return 4 + int(counts[0]) * int(counts[1]) if all(c.isdecimal() and len(c) < 5 for c in counts) else None
