"""Pictures of how a detector with anchors sees a photo: the cells, the anchors, and what answers for which box.

Source: EECS 498, assignment 5, whose 7 x 7 cells are stretched over the whole photo. `photo` may as well be a square
view, as `data/views.py` draws them and detectors see them, with the boxes in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cvlab.data import rng
from cvlab.experiments.detection import drawing as drawing
from cvlab.experiments.detection.data import dataset, voc
from cvlab.experiments.detection.data.annotations import Layout
from cvlab.experiments.detection.drawing import Labelled
from cvlab.ops import anchors, boxes

KINDS = ("grid", "anchors", "targets")
PROPOSALS = "proposals"
SHOWN = 300  # regions before suppression; more hide the photo
CELLS = 7
NEGATIVE_IOU = 0.2
LEAST_SIDE_PX = 700  # small photos are drawn larger, so that lines and words fit
SEED = 0  # of the negatives that are shown
FAINT, BRIGHT = (255, 255, 255, 110), (255, 255, 255, 240)
NEGATIVE = (255, 225, 120)
SHADE = (0, 0, 0, 150)  # under light lines, for photos that are light themselves


@dataclass(frozen=True)
class Answer:
    """The anchor that answers for a box: its place, its flat index among all (A, H, W), its IoU with the box."""

    anchor: int
    row: int
    column: int
    index: int
    iou: float

    @property
    def told(self) -> str:
        """Say it in a few words."""
        width, height = anchors.COURSE_SHAPES[self.anchor]
        return f"[{self.anchor},{self.row},{self.column}] {width}x{height} IoU {self.iou:.2f}"


def annotated(path: Path) -> tuple[Tensor, tuple[str, ...]] | None:
    """Return the boxes (N, 4) of a photo, in its pixels, and their names, from the VOC XML beside it; None without one.

    It is NAME.xml in the same folder, or in Annotations beside the photo's folder. DataError where it is broken.
    """
    places = (path.with_suffix(".xml"), path.parent.parent / "Annotations" / f"{path.stem}.xml")
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        return None
    read = voc.read(place, path)
    classes = tuple(sorted({marked.name for marked in read.objects}))
    if not classes:
        return torch.empty(0, 4), ()
    boxset = dataset.from_layout(str(path), Layout("VOC", {"train": [read]}, classes), 0.0)
    item = boxset.splits["train"][0]
    return item.boxes_xyxy, tuple(classes[label] for label in item.labels.tolist())


def answers(size: tuple[int, int], boxes_xyxy: Tensor, cells: int = CELLS) -> list[Answer]:
    """Return what answers for each box (N, 4), in pixels of a photo of `size` (width, height)."""
    centres, shapes = anchors.grid_centers(cells, cells), torch.tensor(anchors.COURSE_SHAPES)
    index, overlap = anchors.match_anchors_to_boxes(boxes_xyxy / _scale(size, cells), centres, shapes)
    return [
        Answer(place // cells**2, place // cells % cells, place % cells, place, iou)
        for place, iou in zip(index.tolist(), overlap.tolist(), strict=True)
    ]


def negatives(size: tuple[int, int], boxes_xyxy: Tensor, cells: int = CELLS) -> list[int]:
    """Return the flat indices of as many anchors as there are boxes, drawn from those that overlap none by 0.2."""
    every = _every(cells)
    is_negative = anchors.negative_mask(boxes.iou(every, boxes_xyxy / _scale(size, cells)), NEGATIVE_IOU)
    is_negative[[answer.index for answer in answers(size, boxes_xyxy, cells)]] = False
    places = is_negative.nonzero()[:, 0]
    order = rng.permutation(SEED, 0, len(places), places.device)
    chosen: list[int] = places[order[: len(boxes_xyxy)]].tolist()
    return chosen


def draw(
    kind: str,
    photo: Image.Image,
    boxes_xyxy: Tensor | None = None,
    names: Sequence[str] = (),
    cells: int = CELLS,
) -> Image.Image:
    """Draw one of `KINDS` over a photo; boxes (N, 4) in its pixels, with names, are needed for `targets` only.

    `grid`: the cells and their middles. `anchors`: the nine of the middle cell. `targets`: for each box (thin, white)
    its cell and the anchor that answers for it (filled and thick, in one colour, with the anchor's shape and IoU), and
    dotted as many that are negative; without boxes only the cells.
    """
    assert kind in KINDS
    sheet = _enlarged(photo)
    if kind == "targets" and boxes_xyxy is not None and len(boxes_xyxy):
        in_cells = boxes_xyxy / _scale(photo.size, cells)
        return _targets(sheet, in_cells * _scale(sheet.size, cells), names, cells)
    sheet = _cells(sheet, cells, BRIGHT if kind == "grid" else FAINT)
    return _anchors(sheet, cells) if kind == "anchors" else sheet


def proposals(photo: Image.Image, before_xyxy: Tensor, after_xyxy: Tensor) -> Image.Image:
    """Draw a first stage's regions (K, 4) over a photo, side by side before and after suppression, with their numbers.

    Of those before it the surest are drawn.
    """
    plain = _enlarged(photo)
    size, scale = plain.size, torch.tensor([plain.width / photo.width, plain.height / photo.height] * 2)
    halves = []
    for words, places, alpha in (("before", before_xyxy, 90), ("after", after_xyxy, 200)):
        shown = places[:SHOWN] * scale
        layer = Image.new("RGBA", size)
        pen = ImageDraw.Draw(layer)
        for k, place in reversed(list(enumerate(shown.tolist()))):
            pen.rectangle(place, outline=(*drawing.colour(k), alpha), width=_line(plain) + 1)
        more = "" if len(shown) == len(places) else f", the surest {len(shown)} drawn"
        text = f"{len(places)} regions {words} suppression{more}"
        halves.append(drawing.draw(_blend(plain, layer), [Labelled((0, 0, *size), text, 0)]))
    both = Image.new("RGB", (2 * size[0] + 6, size[1]), "white")
    both.paste(halves[0], (0, 0))
    both.paste(halves[1], (size[0] + 6, 0))
    return both


def _enlarged(photo: Image.Image) -> Image.Image:
    """Return a small photo larger, so that lines and words fit."""
    factor = max(1.0, LEAST_SIDE_PX / max(photo.size))
    size = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
    return photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _scale(size: tuple[int, int], cells: int) -> Tensor:
    """Return how many pixels a cell has: (4,), across and down, twice."""
    return torch.tensor([size[0] / cells, size[1] / cells] * 2)


def _every(cells: int) -> Tensor:
    """Return all anchors (A * H * W, 4) in cells."""
    shapes = torch.tensor(anchors.COURSE_SHAPES)
    return anchors.generate_anchors(anchors.grid_centers(cells, cells), shapes).flatten(0, 2)


def _line(photo: Image.Image) -> int:
    """Return how thick a thin line is."""
    return max(1, round(max(photo.size) / 400))


def _blend(photo: Image.Image, layer: Image.Image) -> Image.Image:
    return Image.alpha_composite(photo.convert("RGBA"), layer).convert("RGB")


def _cells(photo: Image.Image, cells: int, light: tuple[int, int, int, int]) -> Image.Image:
    """Draw the lines between cells, and their middles."""
    layer = Image.new("RGBA", photo.size)
    pen = ImageDraw.Draw(layer)
    line = _line(photo)
    width, height = photo.width / cells, photo.height / cells
    for fill, thick in ((SHADE, line + 2), (light, line)):
        for k in range(1, cells):
            pen.line((k * width, 0, k * width, photo.height), fill=fill, width=thick)
            pen.line((0, k * height, photo.width, k * height), fill=fill, width=thick)
        radius = line + thick
        for x, y in anchors.grid_centers(cells, cells).flatten(0, 1).tolist():
            x, y = x * width, y * height
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return _blend(photo, layer)


def _anchors(photo: Image.Image, cells: int) -> Image.Image:
    """Draw the anchors of the middle cell, each in its colour with its width and height in cells."""
    middle = cells // 2 * cells + cells // 2
    at_cell = _every(cells).view(-1, cells * cells, 4)[:, middle] * _scale(photo.size, cells)
    shown = [
        (width * height, Labelled(tuple(box), f"{width}x{height}", k))
        for k, (box, (width, height)) in enumerate(zip(at_cell.tolist(), anchors.COURSE_SHAPES, strict=True))
    ]
    shown.sort(key=lambda pair: pair[0])  # the first lies on top: edges that they share are seen of both
    return drawing.draw(photo, [item for _, item in shown])


def _targets(photo: Image.Image, boxes_xyxy: Tensor, names: Sequence[str], cells: int) -> Image.Image:
    """Draw what answers for each box, and negatives."""
    found = answers(photo.size, boxes_xyxy, cells)
    width, height = photo.width / cells, photo.height / cells
    layer = Image.new("RGBA", photo.size)
    pen = ImageDraw.Draw(layer)
    for k, answer in enumerate(found):
        left, top = answer.column * width, answer.row * height
        pen.rectangle((left, top, left + width, top + height), fill=(*drawing.colour(k), 110))
    photo = _cells(_blend(photo, layer), cells, FAINT)
    every = _every(cells) * _scale(photo.size, cells)
    pen, line = ImageDraw.Draw(photo, "RGBA"), _line(photo)
    for place in negatives(photo.size, boxes_xyxy, cells):
        _dotted(pen, every[place].tolist(), line)
    shown = []
    for k, (answer, name) in enumerate(zip(found, names or [""] * len(found), strict=True)):
        box = tuple(every[answer.index].tolist())
        pen.rectangle(box, outline=drawing.colour(k), width=4 * line)
        wide, high = anchors.COURSE_SHAPES[answer.anchor]
        shown.append(Labelled(box, f"{name} {wide}x{high} {answer.iou:.2f}".strip(), k))
    for box in boxes_xyxy.tolist():
        pen.rectangle(box, outline="black", width=line + 2)
        pen.rectangle(box, outline="white", width=line)
    return drawing.draw(photo, shown)


def _dotted(pen: ImageDraw.ImageDraw, box: list[float], line: int) -> None:
    """Draw a thin dotted rectangle."""
    left, top, right, bottom = box
    step = 6 * line
    for low, high, is_across in ((left, right, True), (top, bottom, False)):
        sides = (top, bottom) if is_across else (left, right)
        for start in range(round(low), round(high), 2 * step):
            end = min(start + step, high)
            for side in sides:
                ends = (start, side, end, side) if is_across else (side, start, side, end)
                pen.line(ends, fill="black", width=line + 4)
                pen.line(ends, fill=NEGATIVE, width=line + 1)
