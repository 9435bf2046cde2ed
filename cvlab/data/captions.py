"""Sets of photos with sentences: Flickr8k, COCO's captions, a CSV of one's own, and sentences about generated scenes.

Sources: Hodosh et al., 2013 (Flickr8k, official splits); Chen et al., 2015, "Microsoft COCO captions".
"""

import csv
import json
from pathlib import Path

from cvlab.errors import DataError


def read_csv(path: Path) -> dict[str, list[str]]:
    """Read a CSV with the columns image and caption: the sentences of each image, in order.

    DataError names file and line where a row has not both.
    """
    found: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip().lower() for name in next(rows, [])]
            if header[:2] != ["image", "caption"]:
                raise DataError(f"{path}:1: not a table of captions", "its first line must be: image,caption")
            for row in rows:
                if not row:
                    continue
                if len(row) < 2 or not row[0].strip() or not row[1].strip():
                    raise DataError(f"{path}:{rows.line_num}: needs an image and a caption", "fill or remove this line")
                found.setdefault(row[0].strip(), []).append(row[1].strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        raise DataError(f"{path}: no caption in it")
    return found


def read_coco(path: Path) -> dict[str, list[str]]:
    """Read COCO's captions: the sentences of each image by its file name. DataError says what is wrong with it."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in told["images"]}
        found: dict[str, list[str]] = {}
        for row in told["annotations"]:
            found.setdefault(names[row["image_id"]], []).append(str(row["caption"]).strip())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: not COCO's captions: {what}", "it needs images and annotations with captions"
        ) from error
    if not found:
        raise DataError(f"{path}: no caption in it")
    return found
