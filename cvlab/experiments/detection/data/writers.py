"""Write boxes as VOC's XML, YOLO's text and COCO's JSON: the inverse of the readers.

Every boxes_xyxy is (N, 4), in pixels from 0, right and bottom edges exclusive.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from torch import Tensor

DECIMALS = 3  # of coordinates in pixels


@dataclass(frozen=True)
class ImageBoxes:
    """An image's file name, its size (width, height) and its boxes; labels (N,) are indices into the classes."""

    filename: str
    size: tuple[int, int]
    boxes_xyxy: Tensor
    labels: Tensor
    scores: Tensor | None = None


def write_voc_xml(
    boxes_xyxy: Tensor,
    names: Sequence[str],
    size: tuple[int, int],
    filename: str,
    difficult: Sequence[bool] | None = None,
    scores: Sequence[float] | None = None,
) -> str:
    """Return VOC's XML of one image of `size` (width, height): pixels count from 1, right and bottom edges inclusive.

    VOC cannot distinguish a box of one pixel or less from a point: readers drop it.
    """
    width, height = size
    lines = ["<annotation>", f"  <filename>{escape(filename)}</filename>"]
    lines += [f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    for k, ((x1, y1, x2, y2), name) in enumerate(zip(boxes_xyxy.tolist(), names, strict=True)):
        edges = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
        box = "".join(f"<{key}>{_number(value)}</{key}>" for key, value in edges.items())
        flag = int(difficult is not None and bool(difficult[k]))
        score = f"<score>{_number(scores[k], 6)}</score>" if scores is not None else ""
        lines.append(f"  <object><name>{escape(name)}</name><difficult>{flag}</difficult>{score}")
        lines.append(f"    <bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])


def write_yolo_txt(boxes_xyxy: Tensor, labels: Tensor, size: tuple[int, int], scores: Tensor | None = None) -> str:
    """Return YOLO's lines of one image of `size` (width, height): class, center, sides in fractions, the score."""
    width, height = size
    lines = []
    for k, (x1, y1, x2, y2) in enumerate(boxes_xyxy.tolist()):
        fractions = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        numbers = (*fractions, *([float(scores[k])] if scores is not None else []))
        lines.append(" ".join([str(int(labels[k])), *(f"{number:.7f}" for number in numbers)]) + "\n")
    return "".join(lines)


def write_coco_json(images: Sequence[ImageBoxes], classes: Sequence[str]) -> str:
    """Return COCO's JSON of many images; ids count from 1, in the order of `images` and `classes`."""
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        for k, (x1, y1, x2, y2) in enumerate(image.boxes_xyxy.tolist()):
            box = [round(value, DECIMALS) for value in (x1, y1, x2 - x1, y2 - y1)]
            record = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(image.labels[k]) + 1}
            score = {"score": round(float(image.scores[k]), 6)} if image.scores is not None else {}
            annotations.append({**record, "bbox": box, "area": round(box[2] * box[3], DECIMALS), "iscrowd": 0, **score})
    files = [
        {"id": image_id, "file_name": image.filename, "width": image.size[0], "height": image.size[1]}
        for image_id, image in enumerate(images, 1)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
    return json.dumps({"images": files, "annotations": annotations, "categories": categories})


def _number(value: float, decimals: int = DECIMALS) -> str:
    """Format a number without trailing zeros."""
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".")
