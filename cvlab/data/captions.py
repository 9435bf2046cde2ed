"""Readers of caption files: a CSV, and COCO's JSON.

A caption is read whole or not at all: in a CSV of two columns everything after the first comma is the caption, quoted
or not; an opening quote without a closing one, or a JSON value that is no text, is an error with its place.

Reference: Chen et al., 2015, "Microsoft COCO captions: data collection and evaluation server".
"""

import csv
import re
from pathlib import Path

from cvlab import console
from cvlab.data import coco, files
from cvlab.errors import DataError

COLUMNS = ["image", "caption"]
NEW_ROW = re.compile(r"""\s*("[^"]+"|[^\s",]+|[^",]+\.(jpe?g|png|bmp|webp))\s*,""", re.IGNORECASE)
QUOTED = re.compile(r"""\s*"((?:[^"]|"")*)"\s*""")
SHOWN_LINES = 3


def read(path: Path) -> dict[str, list[str]]:
    """Read the captions of each image from a CSV or COCO's JSON, whichever the file holds. Raises DataError."""
    is_json = path.suffix.lower() == ".json" or files.read_start(path).lstrip()[:1] == "{"
    return read_coco(path) if is_json else read_csv(path)


def read_csv(path: Path) -> dict[str, list[str]]:
    """Read a CSV with the columns image and caption.

    Args:
        path: The file; its first line is `image,caption`, perhaps with further columns.

    Returns:
        The captions of each image by its name, in the file's order.

    Raises:
        DataError: The file cannot be read, or a row has no image, no caption, or more columns; names file and line.
    """
    lines = re.split(r"\r\n|\r|\n", files.read_text(path, coco.MAX_BYTES))
    header = [name.strip().strip('"').lower() for name in lines[0].split(",")]
    if header[:2] != COLUMNS:
        raise DataError(f"{path}:1: not a table of captions", "its first line must be: image,caption")
    captions: dict[str, list[str]] = {}
    joined: list[str] = []
    number = 1
    while number < len(lines):
        location, start = f"{path}:{number + 1}", number
        number, record = _next_record(lines, number, location)
        if not record.strip():
            continue
        image, caption = _split_record(record, location) if len(header) == 2 else _columns(record, header, location)
        if not image or not caption:
            raise DataError(f"{location}: needs an image and a caption", "fill or remove this line")
        if len(header) == 2 and "," in caption and not lines[start].rstrip().endswith('"'):
            joined.append(location)
        captions.setdefault(image, []).append(" ".join(caption.splitlines()))
    if not captions:
        raise DataError(f"{path}: no caption in it")
    if joined:
        shown = ", ".join(joined[:SHOWN_LINES]) + (", ..." if len(joined) > SHOWN_LINES else "")
        console.info(f"warning: captions with commas but without quotes read whole: {len(joined)} ({shown})")
    return captions


def _next_record(lines: list[str], number: int, location: str) -> tuple[int, str]:
    """Return the number of the line after a record, and the record: several lines if a quoted caption has them.

    Raises DataError if a quote is opened and not closed, or not before what looks like the next row.
    """
    record = lines[number]
    after_image = record.partition(",")[2].lstrip()
    if not (record.lstrip().startswith('"') or after_image.startswith('"')) or record.count('"') % 2 == 0:
        return number + 1, record
    for end in range(number + 1, len(lines)):
        if NEW_ROW.match(lines[end]):
            break
        record += "\n" + lines[end]
        if lines[end].count('"') % 2:
            return end + 1, record
    raise DataError(f"{location}: a quote is not closed", 'close it, or write "" for a quote within quotes')


def _split_record(record: str, location: str) -> tuple[str, str]:
    """Return the image and the caption of a record of two columns; the caption may have commas and quotes."""
    quoted = QUOTED.match(record)
    if quoted is not None and record[quoted.end() :].startswith(","):
        image, rest = quoted[1].replace('""', '"'), record[quoted.end() + 1 :]
    else:
        image, _, rest = record.partition(",")
    caption = rest.strip()
    whole = QUOTED.fullmatch(caption)
    if whole is not None:
        caption = whole[1].replace('""', '"')
    elif caption.startswith('"') and '""' in caption:
        raise DataError(f"{location}: text after the closing quote", "quote the whole caption")
    return image.strip(), caption.strip()


def _columns(record: str, header: list[str], location: str) -> tuple[str, str]:
    """Return the image and the caption of a record of more columns. Raises DataError if it has not as many."""
    try:
        row = next(csv.reader([record], strict=True))
    except csv.Error as error:
        raise DataError(f"{location}: {error}", "quote the whole caption") from error
    if len(row) != len(header):
        problem = f"{len(row)} columns where the first line has {len(header)}"
        raise DataError(f"{location}: {problem}", "quote a caption that has commas")
    return row[0].strip(), row[1].strip()


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
    for location, image, record in file.annotations(images):
        if image is None:
            raise DataError(f"{location}: image_id is not the id of an image", coco.HINT)
        caption = record.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{location}: has no caption", coco.HINT)
        captions.setdefault(names[image], []).append(caption.strip())
    if not captions:
        raise DataError(f"{path}: no caption in it")
    return captions
