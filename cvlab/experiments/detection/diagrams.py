"""Diagrams of how an anchor-based detector sees a photo: the grid, the anchors, the training targets, the proposals.

References: EECS 498, assignment 5, whose 7 x 7 cells are stretched over the whole photo. `photo` may also be a square
view of data/augment.py, which is what detectors are given, with boxes in its pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cvlab.data import rng
from cvlab.experiments.detection import drawing
from cvlab.experiments.detection.data import dataset, voc
from cvlab.experiments.detection.data.annotations import AnnotationSet
from cvlab.experiments.detection.drawing import LabeledBox
from cvlab.ops import anchors, boxes

KINDS = ("grid", "anchors", "targets")
PROPOSALS = "proposals"
MAX_PROPOSALS = 300  # drawn; more would hide the photo
NUM_CELLS = 7
NEGATIVE_IOU = 0.2
MIN_SIDE_PX = 700  # smaller photos are enlarged, so that lines and text fit
SEED = 0  # of the sample of negatives that is drawn
FAINT, BRIGHT = (255, 255, 255, 110), (255, 255, 255, 240)
NEGATIVE_COLOR = (255, 225, 120)
SHADE = (0, 0, 0, 150)  # below light lines, for light photos


@dataclass(frozen=True)
class AnchorMatch:
    """The positive anchor of a box: its shape and cell, its flat index among all (A, H, W), its IoU with the box."""

    anchor: int
    row: int
    column: int
    index: int
    iou: float

    @property
    def description(self) -> str:
        """The match in a few words."""
        width, height = anchors.COURSE_SHAPES[self.anchor]
        return f"[{self.anchor},{self.row},{self.column}] {width}x{height} IoU {self.iou:.2f}"


def read_annotation(path: Path) -> tuple[Tensor, tuple[str, ...]] | None:
    """Return a photo's boxes (N, 4), in its pixels, and their classes from the VOC XML that belongs to it, or None.

    It is NAME.xml in the same folder, or in Annotations beside the photo's folder. DataError if it is broken.
    """
    candidates = (path.with_suffix(".xml"), path.parent.parent / "Annotations" / f"{path.stem}.xml")
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        return None
    annotation = voc.read(file, path)
    classes = tuple(sorted({obj.name for obj in annotation.objects}))
    if not classes:
        return torch.empty(0, 4), ()
    box_dataset = dataset.from_annotations(str(path), AnnotationSet("VOC", {"train": [annotation]}, classes), 0.0)
    sample = box_dataset.splits["train"][0]
    return sample.boxes_xyxy, tuple(classes[label] for label in sample.labels.tolist())


def match_anchors(size: tuple[int, int], boxes_xyxy: Tensor, num_cells: int = NUM_CELLS) -> list[AnchorMatch]:
    """Return the positive anchor of each box (N, 4), in pixels of a photo of `size` (width, height)."""
    centers, shapes = anchors.grid_centers(num_cells, num_cells), torch.tensor(anchors.COURSE_SHAPES)
    index, iou = anchors.match_anchors_to_boxes(boxes_xyxy / _cell_px(size, num_cells), centers, shapes)
    return [
        AnchorMatch(k // num_cells**2, k // num_cells % num_cells, k % num_cells, k, box_iou)
        for k, box_iou in zip(index.tolist(), iou.tolist(), strict=True)
    ]


def sample_negatives(size: tuple[int, int], boxes_xyxy: Tensor, num_cells: int = NUM_CELLS) -> list[int]:
    """Sample as many negative anchors as there are boxes; return their flat indices."""
    iou = boxes.iou(_all_anchors(num_cells), boxes_xyxy / _cell_px(size, num_cells))
    is_negative = anchors.negative_mask(iou, NEGATIVE_IOU)
    is_negative[[match.index for match in match_anchors(size, boxes_xyxy, num_cells)]] = False
    negatives = is_negative.nonzero()[:, 0]
    order = rng.permutation(SEED, 0, len(negatives), negatives.device)
    sampled: list[int] = negatives[order[: len(boxes_xyxy)]].tolist()
    return sampled


def draw(
    kind: str,
    photo: Image.Image,
    boxes_xyxy: Tensor | None = None,
    names: Sequence[str] = (),
    num_cells: int = NUM_CELLS,
) -> Image.Image:
    """Draw one of `KINDS` over a photo.

    Args:
        kind: `grid` draws the cells and their centers. `anchors` draws the nine anchors of the middle cell. `targets`
            draws for each box (thin, white) its cell and its positive anchor (filled and thick, in one color, with the
            anchor's shape and IoU), and as many negatives, dotted; without boxes only the cells.
        photo: The photo; small ones are enlarged.
        boxes_xyxy: (N, 4), in pixels of the photo; used by `targets` only.
        names: The classes of the boxes.
        num_cells: Cells along a side of the photo.
    """
    assert kind in KINDS
    canvas = _enlarge(photo)
    if kind == "targets" and boxes_xyxy is not None and len(boxes_xyxy):
        in_cells = boxes_xyxy / _cell_px(photo.size, num_cells)
        return _draw_targets(canvas, in_cells * _cell_px(canvas.size, num_cells), names, num_cells)
    canvas = _draw_cells(canvas, num_cells, BRIGHT if kind == "grid" else FAINT)
    return _draw_anchors(canvas, num_cells) if kind == "anchors" else canvas


def draw_proposals(photo: Image.Image, before_xyxy: Tensor, after_xyxy: Tensor) -> Image.Image:
    """Draw a first stage's proposals (K, 4) over a photo, side by side before and after non-maximum suppression.

    Of those before it only the highest-scoring are drawn.
    """
    canvas = _enlarge(photo)
    size, scale = canvas.size, torch.tensor([canvas.width / photo.width, canvas.height / photo.height] * 2)
    halves = []
    for stage, proposals, alpha in (("before", before_xyxy, 90), ("after", after_xyxy, 200)):
        shown = proposals[:MAX_PROPOSALS] * scale
        layer = Image.new("RGBA", size)
        pen = ImageDraw.Draw(layer)
        for k, box in reversed(list(enumerate(shown.tolist()))):
            pen.rectangle(box, outline=(*drawing.color_of(k), alpha), width=_line_width(canvas) + 1)
        omitted = "" if len(shown) == len(proposals) else f", top {len(shown)} drawn"
        text = f"{len(proposals)} proposals {stage} NMS{omitted}"
        halves.append(drawing.draw(_blend(canvas, layer), [LabeledBox((0, 0, *size), text, 0)]))
    both = Image.new("RGB", (2 * size[0] + 6, size[1]), "white")
    both.paste(halves[0], (0, 0))
    both.paste(halves[1], (size[0] + 6, 0))
    return both


def _enlarge(photo: Image.Image) -> Image.Image:
    """Enlarge a small photo, so that lines and text fit."""
    factor = max(1.0, MIN_SIDE_PX / max(photo.size))
    size = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
    return photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _cell_px(size: tuple[int, int], num_cells: int) -> Tensor:
    """Return the width and height of a cell in pixels, twice: (4,)."""
    return torch.tensor([size[0] / num_cells, size[1] / num_cells] * 2)


def _all_anchors(num_cells: int) -> Tensor:
    """Return all anchors (A * H * W, 4), in cells."""
    shapes = torch.tensor(anchors.COURSE_SHAPES)
    return anchors.generate_anchors(anchors.grid_centers(num_cells, num_cells), shapes).flatten(0, 2)


def _line_width(photo: Image.Image) -> int:
    """Return the width of a thin line."""
    return max(1, round(max(photo.size) / 400))


def _blend(photo: Image.Image, layer: Image.Image) -> Image.Image:
    return Image.alpha_composite(photo.convert("RGBA"), layer).convert("RGB")


def _draw_cells(photo: Image.Image, num_cells: int, color: tuple[int, int, int, int]) -> Image.Image:
    """Draw the lines between cells, and their centers."""
    layer = Image.new("RGBA", photo.size)
    pen = ImageDraw.Draw(layer)
    line = _line_width(photo)
    width, height = photo.width / num_cells, photo.height / num_cells
    for fill, thickness in ((SHADE, line + 2), (color, line)):
        for k in range(1, num_cells):
            pen.line((k * width, 0, k * width, photo.height), fill=fill, width=thickness)
            pen.line((0, k * height, photo.width, k * height), fill=fill, width=thickness)
        radius = line + thickness
        for x, y in anchors.grid_centers(num_cells, num_cells).flatten(0, 1).tolist():
            x, y = x * width, y * height
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return _blend(photo, layer)


def _draw_anchors(photo: Image.Image, num_cells: int) -> Image.Image:
    """Draw the anchors of the middle cell, each in its color with its width and height in cells."""
    middle = num_cells // 2 * num_cells + num_cells // 2
    at_cell = _all_anchors(num_cells).view(-1, num_cells * num_cells, 4)[:, middle] * _cell_px(photo.size, num_cells)
    by_area = [
        (width * height, LabeledBox(tuple(box), f"{width}x{height}", k))
        for k, (box, (width, height)) in enumerate(zip(at_cell.tolist(), anchors.COURSE_SHAPES, strict=True))
    ]
    by_area.sort(key=lambda pair: pair[0])  # the smallest is drawn on top, so that shared edges are visible of both
    return drawing.draw(photo, [item for _, item in by_area])


def _draw_targets(photo: Image.Image, boxes_xyxy: Tensor, names: Sequence[str], num_cells: int) -> Image.Image:
    """Draw the positive anchor of each box, and a sample of negatives."""
    matches = match_anchors(photo.size, boxes_xyxy, num_cells)
    width, height = photo.width / num_cells, photo.height / num_cells
    layer = Image.new("RGBA", photo.size)
    pen = ImageDraw.Draw(layer)
    for k, match in enumerate(matches):
        left, top = match.column * width, match.row * height
        pen.rectangle((left, top, left + width, top + height), fill=(*drawing.color_of(k), 110))
    photo = _draw_cells(_blend(photo, layer), num_cells, FAINT)
    all_anchors = _all_anchors(num_cells) * _cell_px(photo.size, num_cells)
    pen, line = ImageDraw.Draw(photo, "RGBA"), _line_width(photo)
    for index in sample_negatives(photo.size, boxes_xyxy, num_cells):
        _draw_dotted(pen, all_anchors[index].tolist(), line)
    labels = []
    for k, (match, name) in enumerate(zip(matches, names or [""] * len(matches), strict=True)):
        box = tuple(all_anchors[match.index].tolist())
        pen.rectangle(box, outline=drawing.color_of(k), width=4 * line)
        cells_wide, cells_high = anchors.COURSE_SHAPES[match.anchor]
        labels.append(LabeledBox(box, f"{name} {cells_wide}x{cells_high} {match.iou:.2f}".strip(), k))
    for box in boxes_xyxy.tolist():
        pen.rectangle(box, outline="black", width=line + 2)
        pen.rectangle(box, outline="white", width=line)
    return drawing.draw(photo, labels)


def _draw_dotted(pen: ImageDraw.ImageDraw, box: list[float], line: int) -> None:
    """Draw a thin dotted rectangle."""
    left, top, right, bottom = box
    step = 6 * line
    for low, high, is_horizontal in ((left, right, True), (top, bottom, False)):
        sides = (top, bottom) if is_horizontal else (left, right)
        for start in range(round(low), round(high), 2 * step):
            end = min(start + step, high)
            for side in sides:
                ends = (start, side, end, side) if is_horizontal else (side, start, side, end)
                pen.line(ends, fill="black", width=line + 4)
                pen.line(ends, fill=NEGATIVE_COLOR, width=line + 1)
