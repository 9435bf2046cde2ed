"""The numbers of `cvlab data show` as lines of text, for the terminal and the page."""

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]
MAX_CLASSES, MAX_EXAMPLES = 100, 5


def class_table(document: Document) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: the number of images of each split, then of each class, the most frequent first."""
    splits = list(document["images"])
    rows = [["images", *(f"{document['images'][split]:,}" for split in splits)]]
    classes = document["classes"]
    names = list(dict.fromkeys(name for counts in classes.values() for name in counts))
    names.sort(key=lambda name: -sum(counts.get(name, 0) for counts in classes.values()))
    rows += [[name, *(f"{classes.get(split, {}).get(name, 0):,}" for split in splits)] for name in names[:MAX_CLASSES]]
    if len(names) > MAX_CLASSES:
        rows.append([f"{len(names) - MAX_CLASSES} more classes", *("" for _ in splits)])
    return ["", *splits], rows


def size_lines(document: Document) -> dict[str, str]:
    """Return the smallest, middle and largest width and height in pixels."""
    sizes = document["sizes"]
    return {
        f"{side} (px)": f"{sizes[side][0]} to {sizes[side][2]}, median {sizes[side][1]}"
        for side in ("width", "height")
        if sizes[side]
    }


def copy_lines(document: Document) -> list[str]:
    """Return sentences about exact and near copies, with examples."""
    count, across = document["num_copies"], document["num_copies_across_splits"]
    lines = [f"{count} {'image occurs' if count == 1 else 'images occur'} more than once, {across} in several splits"]
    lines += ["same: " + " = ".join(map(_place, members)) for members in document["copies"][:MAX_EXAMPLES]]
    near = document["near_copies"]
    if near is None:
        return [*lines, "near copies were not searched: the data set has too many images"]
    lines.append(f"{len(near)} {'pair' if len(near) == 1 else 'pairs'} of near copies, by the features of the images")
    for pair in near[:MAX_EXAMPLES]:
        lines.append(f"near ({pair['similarity']:.3f}): " + ", ".join(map(_place, pair["images"])))
    return lines


def _place(row: Mapping[str, str]) -> str:
    return f"{row['image']} ({row['split']})"
