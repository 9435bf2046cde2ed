"""Write boxes as VOC's XML, YOLO's text and COCO's JSON: the inverse of the readers.

Every boxes_xyxy is (N, 4), in pixels from 0, right and bottom edges exclusive.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from torch import Tensor

DECIMALS = 3  # of coordinates in pixels
COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of 1 to 90, between those of COCO's 80 classes
COCO_CATEGORY_IDS = tuple(k for k in range(1, 91) if k not in COCO_UNUSED_IDS)


@dataclass(frozen=True)
class ImageBoxes:
    """An image's file name, its size (width, height) and its boxes; labels (N,) are indices into the classes."""

    filename: str
    size: tuple[int, int]
    boxes_xyxy: Tensor
    labels: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class CocoIds:
    """The ids of images, and of categories by label, in COCO's files."""

    images: Sequence[int]
    categories: Sequence[int]


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


def write_coco_json(images: Sequence[ImageBoxes], classes: Sequence[str], ids: CocoIds | None = None) -> str:
    """Return a COCO data set; without `ids` they count from 1, in the order of `images` and `classes`."""
    ids = ids or CocoIds(range(1, len(images) + 1), range(1, len(classes) + 1))
    annotations: list[dict[str, Any]] = []
    for record in _coco_records(images, ids):
        area = round(record["bbox"][2] * record["bbox"][3], DECIMALS)
        annotations.append({"id": len(annotations) + 1, **record, "area": area, "iscrowd": 0})
    files = [
        {"id": image_id, "file_name": image.filename, "width": image.size[0], "height": image.size[1]}
        for image_id, image in zip(ids.images, images, strict=True)
    ]
    categories = [{"id": k, "name": name} for k, name in zip(ids.categories, classes, strict=True)]
    return json.dumps({"images": files, "annotations": annotations, "categories": categories})


def write_coco_results(images: Sequence[ImageBoxes], ids: CocoIds) -> str:
    """Return COCO's list of results, which `COCO.loadRes` takes; each names its file too."""
    names = dict(zip(ids.images, (image.filename for image in images), strict=True))
    return json.dumps([{**record, "file_name": names[record["image_id"]]} for record in _coco_records(images, ids)])


def _coco_records(images: Sequence[ImageBoxes], ids: CocoIds) -> Iterator[dict[str, Any]]:
    """Yield the boxes of images as records of image, category, box and, if there is one, score."""
    for image_id, image in zip(ids.images, images, strict=True):
        for k, (x1, y1, x2, y2) in enumerate(image.boxes_xyxy.tolist()):
            box = [round(value, DECIMALS) for value in (x1, y1, x2 - x1, y2 - y1)]
            score = {"score": round(float(image.scores[k]), 6)} if image.scores is not None else {}
            yield {"image_id": image_id, "category_id": ids.categories[int(image.labels[k])], "bbox": box, **score}


def _number(value: float, decimals: int = DECIMALS) -> str:
    """Format a number without trailing zeros."""
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".")
