"""Parse COCO's JSON: lists of records (`images`, `annotations`, perhaps `categories`) that refer to each other by id.

References: Lin et al., 2014, "Microsoft COCO"; cocodataset.org/#format-data.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvlab.data import files
from cvlab.errors import DataError

MAX_BYTES = 600_000_000  # COCO's own train2017 has 470 MB
HINT = "correct the file, or download it again"
MAX_DIGITS = 18
Record = dict[str, Any]
Id = int | str


@dataclass(frozen=True)
class CocoFile:
    """A parsed file; the methods check what they return and raise DataError."""

    path: Path
    content: Record

    def records(self, key: str) -> list[Any]:
        """Return the list called `key`; its entries are not checked."""
        records = self.content.get(key)
        if not isinstance(records, list):
            raise DataError(f"{self.path}: has no list of {key}", "COCO's JSON has images, annotations and categories")
        return records

    def by_id(self, key: str) -> dict[Id, Record]:
        """Return the records of the list called `key` by their unique ids. Raises DataError if one has none."""
        records: dict[Id, Record] = {}
        for k, record in enumerate(self.records(key)):
            number = parse_id(record.get("id")) if isinstance(record, dict) else None
            if number is None or records.get(number, record) != record:
                shown = str(record.get("id"))[:40] if isinstance(record, dict) else "missing"
                raise DataError(f"{self.path}: {key}[{k}]: id is not a unique integer: {shown}", HINT)
            records[number] = record
        return records

    def annotations(self, images: dict[Id, Record]) -> list[tuple[str, Id | None, Record]]:
        """Return the annotations: where each is, for messages, the image that it is of (None: of none), itself."""
        annotations = []
        for k, record in enumerate(self.records("annotations")):
            record = record if isinstance(record, dict) else {}
            image = parse_id(record.get("image_id"))
            annotations.append((f"{self.path}: annotations[{k}]", image if image in images else None, record))
        return annotations

    def text(self, name: str, record: Record, key: str) -> str:
        """Return the non-empty string that the record called `name` has under `key`."""
        value = record.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.path}: {name} has no {key}", HINT)
        return value


def parse_id(value: Any) -> Id | None:
    """Return an id: a whole number, also if a program has written it as text or as 7.0, or a word; else None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS else text or None
    return value if type(value) is int or isinstance(value, str) else None


def read(path: Path) -> CocoFile:
    """Parse a file. Raises DataError if it is not a JSON object; NaN and infinities are rejected."""

    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        content = json.loads(files.read_bytes(path, MAX_BYTES), parse_constant=reject)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}", HINT) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}", HINT) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a COCO file: its top level is not an object", HINT)
    return CocoFile(path, content)
