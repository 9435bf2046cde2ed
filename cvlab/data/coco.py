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
Record = dict[str, Any]


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

    def by_id(self, key: str) -> dict[int, Record]:
        """Return the records of the list called `key` by their ids, which must be unique integers."""
        records: dict[int, Record] = {}
        for k, record in enumerate(self.records(key)):
            number = record.get("id") if isinstance(record, dict) else None
            if type(number) is not int or number in records:
                raise DataError(f"{self.path}: {key}[{k}]: id is not a unique integer: {str(number)[:40]}", HINT)
            records[number] = record
        return records

    def annotations(self, images: dict[int, Record]) -> list[tuple[str, Record]]:
        """Return the annotations, each of which must refer to one of the images, with their locations for messages."""
        annotations = []
        for k, record in enumerate(self.records("annotations")):
            location = f"{self.path}: annotations[{k}]"
            if not isinstance(record, dict) or not is_key(record.get("image_id"), images):
                raise DataError(f"{location}: image_id is not the id of an image", HINT)
            annotations.append((location, record))
        return annotations

    def text(self, name: str, record: Record, key: str) -> str:
        """Return the non-empty string that the record called `name` has under `key`."""
        value = record.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.path}: {name} has no {key}", HINT)
        return value


def is_key(value: Any, records: dict[int, Any]) -> bool:
    """Whether a value from a file is the id of one of the records."""
    return isinstance(value, int | float) and value in records


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
