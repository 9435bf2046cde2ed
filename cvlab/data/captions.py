"""Readers of caption files: a CSV, and COCO's JSON.

Reference: Chen et al., 2015, "Microsoft COCO captions: data collection and evaluation server".
"""

import csv
from pathlib import Path

from cvlab.data import coco
from cvlab.errors import DataError


def read_csv(path: Path) -> dict[str, list[str]]:
    """Read a CSV with the columns image and caption.

    Args:
        path: The file; its first line is `image,caption`.

    Returns:
        The captions of each image by its name, in the file's order.

    Raises:
        DataError: The file cannot be read, or a row has no image or no caption; names file and line.
    """
    captions: dict[str, list[str]] = {}
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
                captions.setdefault(row[0].strip(), []).append(row[1].strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not captions:
        raise DataError(f"{path}: no caption in it")
    return captions


def read_coco(path: Path) -> dict[str, list[str]]:
    """Read captions in COCO's JSON format.

    Args:
        path: The file, with `images` and `annotations`.

    Returns:
        The captions of each image by its file name, in the file's order.

    Raises:
        DataError: The file cannot be read, or is no such file.
    """
    file = coco.read(path)
    images = file.by_id("images")
    names = {key: file.text(f"image {key}", record, "file_name") for key, record in images.items()}
    captions: dict[str, list[str]] = {}
    for location, record in file.annotations(images):
        caption = record.get("caption")
        if not isinstance(caption, str):
            raise DataError(f"{location}: has no caption", coco.HINT)
        captions.setdefault(names[record["image_id"]], []).append(caption.strip())
    if not captions:
        raise DataError(f"{path}: no caption in it")
    return captions
