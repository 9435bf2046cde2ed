"""Sets of photos with boxes: what the readers give, checked against the photos and made into tensors.

A box that reaches beyond its photo is clipped, one wholly outside is refused, one without area is left out and counted.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cvlab import console, registry
from cvlab.data import photos, rng
from cvlab.data.datasets import DatasetSize, DatasetSource
from cvlab.data.scenes import generator
from cvlab.data.scenes.render import SHAPES
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.data import annotations, coco, scenes, voc, yolo
from cvlab.experiments.detection.data.annotations import SPLITS, Annotated, Layout, Marked

CUSTOM = "boxes"
SEED = 0  # of the photos that become `val`
SLACK_PX = 0.02  # beyond an edge, from fractions that were rounded
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PLACES = {  # below the root
    "voc07": ("VOCdevkit/VOC2007", "VOC/VOC2007"),
    "fruit": ("VOC/fruit",),
    "bccd": ("VOC/bccd",),
}
LAYOUTS = (
    "VOC (Annotations/*.xml and JPEGImages), YOLO (images/train, labels/train, data.yaml) "
    "or COCO (a JSON file, or annotations/*.json and images)"
)


@dataclass(frozen=True)
class DetectionSample:
    """One photo and its boxes.

    `boxes_xyxy` is float32 (N, 4) in pixels of the photo as `photos.load` gives it, from 0, right and bottom edges
    exclusive; `labels` int64 (N,), indices into the classes; `difficult` bool (N,). `confidence` (N,), in [0, 1], is
    there where a teacher drew them, more or less sure.
    """

    path: Path
    boxes_xyxy: Tensor
    labels: Tensor
    difficult: Tensor
    confidence: Tensor | None = None


@dataclass(frozen=True)
class DetectionDataset:
    """A set of photos with boxes; `splits` has `train`, `val` and `test`, of which the last may be empty."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[DetectionSample, ...]]

    def load(self, item: DetectionSample) -> Image.Image:
        """Decode a photo."""
        return photos.load(item.path)


@dataclass
class _Odd:
    """The files in which something was odd, one entry for each box or photo."""

    empty: list[Path] = field(default_factory=list)
    clipped: list[Path] = field(default_factory=list)
    size: list[Path] = field(default_factory=list)

    def report(self, name: str) -> None:
        """Say what was odd: one line for each kind."""
        if self.empty:
            _warn_once(f"{name}: boxes without area left out: {_counted(self.empty)}")
        if self.size:
            what = "photos of another size than their annotation claims"
            _warn_once(f"{name}: {what}, boxes taken as they are: {_counted(self.size)}")
        if self.clipped:
            console.debug(f"{name}: boxes clipped at the edge of their photo: {_counted(self.clipped)}")


@functools.cache
def _warn_once(text: str) -> None:
    """Say it the first time: a plan and its run read the same annotations."""
    console.info(f"warning: {text}")


def _counted(files: list[Path]) -> str:
    return f"{len(files)}, the first in {files[0]}"


def load(name: str, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
    """Read the set called `name` from below `root`, or the user's own (`boxes`) from `path`.

    Where the set has no validation list, the last `val_fraction` of its training photos in a fixed random order are
    `val`. DataError where a file is missing or broken; ConfigError for a path that is missing or too much.
    """
    if (name == CUSTOM) != (path is not None):
        raise ConfigError(f"data {name}: " + ("path is missing" if path is None else "path goes with name: boxes"))
    if name == "everyday":
        from cvlab.experiments.detection.data import everyday  # which reads another set by this function

        return everyday.load(root)
    return from_layout(name, read_custom(Path(path)) if path is not None else _read_known(name, root), val_fraction)


def _read_known(name: str, root: Path) -> Layout:
    if name == SCENES.name:
        return voc.read_folder(scenes.SET.folder(root), tuple(SHAPES))
    if name not in PLACES:
        raise registry.unknown_name_error("set of photos with boxes", name, (*PLACES, SCENES.name, CUSTOM))
    folder = place(name, root)
    if folder is None:
        raise DataError(f"{name} is not in {root}", f"`cvlab data fetch {name}` gets it, or says how")
    return voc.read_folder(folder, VOC_CLASSES if name == "voc07" else None)


def place(name: str, root: Path) -> Path | None:
    """Return the folder of a set that is on the disk."""
    folders = [root / below for below in PLACES[name]]
    return next((folder for folder in folders if (folder / voc.LISTS / "train.txt").is_file()), None)


def read_custom(path: Path) -> Layout:
    """Read the user's own folder or file in the layout that it has."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder", f"name {LAYOUTS}")
    folder = path.parent if path.suffix in (".yaml", ".yml") else path
    if folder.is_dir() and voc.fits(folder):
        layout = voc.read_folder(folder)
    elif folder.is_dir() and yolo.fits(folder):
        layout = yolo.read_folder(folder)
    elif coco.fits(folder):
        layout = coco.read_path(folder)
    else:
        raise DataError(f"{path}: in none of the layouts that are known", f"name {LAYOUTS}")
    console.debug(f"{path}: read as {layout.kind}")
    return layout


def from_layout(name: str, layout: Layout, val_fraction: float, warn: bool = True) -> DetectionDataset:
    """Check what was read against the photos, and split off `val` where it is missing.

    Where nothing lists the classes, they are the names of all objects, sorted.
    """
    objects = (marked for items in layout.splits.values() for item in items for marked in item.objects)
    classes = tuple(sorted({marked.name for marked in objects})) if layout.classes is None else layout.classes
    index = {known: k for k, known in enumerate(classes)}
    if len(index) < len(classes):
        twice = next(known for known in classes if classes.count(known) > 1)
        raise DataError(f"{name}: the class {twice!r} is named twice", "rename one of the two")
    odd = _Odd()
    splits = {s: tuple(_checked(item, index, odd) for item in layout.splits.get(s, ())) for s in SPLITS}
    if warn:
        odd.report(name)
    if not splits["train"]:
        raise DataError(f"{name}: no photos to train on", f"the {layout.kind} layout has {_held(splits)}")
    if not index:
        raise DataError(f"{name}: no object in any photo", "a detector needs some to train on")
    if not splits["val"] and val_fraction > 0:
        splits["train"], splits["val"] = _split_off(splits["train"], val_fraction)
    return DetectionDataset(name, classes, splits)


def _held(splits: dict[str, tuple[DetectionSample, ...]]) -> str:
    return ", ".join(f"{len(items)} photos in {split}" for split, items in splits.items())


def _split_off(
    train: tuple[DetectionSample, ...], fraction: float
) -> tuple[tuple[DetectionSample, ...], tuple[DetectionSample, ...]]:
    order = rng.permutation(SEED, 0, len(train), torch.device("cpu")).tolist()
    num_val = min(len(train) - 1, max(1, round(len(train) * fraction)))
    shuffled = tuple(train[k] for k in order)
    return shuffled[: len(train) - num_val], shuffled[len(train) - num_val :]


def _checked(item: Annotated, index: dict[str, int], odd: _Odd) -> DetectionSample:
    """Make tensors of one photo's boxes, turned as its EXIF turns it, clipped, those without area left out."""
    header = annotations.header(item.image)
    stored = (header.width, header.height)
    across = header.orientation >= 5  # turned by a quarter
    shown = stored[::-1] if across else stored
    turn = across and item.size == stored and stored != shown  # whoever drew these boxes saw the photo unturned
    if item.size not in (None, stored, shown):
        odd.size.append(item.file)
    width, height = stored if turn else shown
    boxes, labels, difficult = [], [], []
    for marked in item.objects:
        box = _clipped(marked, item, (width, height), odd)
        if box is None:
            continue
        boxes.append(box)
        labels.append(_label(marked, index))
        difficult.append(marked.difficult)
    boxes_xyxy = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    if turn:
        boxes_xyxy = turned(boxes_xyxy, header.orientation, stored)
    return DetectionSample(item.image, boxes_xyxy, torch.tensor(labels).long(), torch.tensor(difficult).bool())


def _label(marked: Marked, index: dict[str, int]) -> int:
    if marked.name not in index:
        error = registry.unknown_name_error("class", marked.name, index)
        raise DataError(f"{marked.place}: {error.message}", error.hint)
    return index[marked.name]


def _clipped(marked: Marked, item: Annotated, size: tuple[int, int], odd: _Odd) -> annotations.Box | None:
    """Return a box inside its photo; None where it has no area."""
    width, height = size
    scale_x, scale_y = size if item.relative else (1, 1)
    x1, x2 = marked.box_xyxy[0] * scale_x, marked.box_xyxy[2] * scale_x
    y1, y2 = marked.box_xyxy[1] * scale_y, marked.box_xyxy[3] * scale_y
    if x2 <= x1 or y2 <= y1:
        odd.empty.append(item.file)
        return None
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        what = f"the box {x1:g} {y1:g} {x2:g} {y2:g} lies outside the photo of {width} x {height} px"
        raise DataError(f"{marked.place}: {what}", "correct or remove it")
    if min(x1, y1) < -SLACK_PX or x2 > width + SLACK_PX or y2 > height + SLACK_PX:
        odd.clipped.append(item.file)
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def turned(boxes_xyxy: Tensor, orientation: int, size: tuple[int, int]) -> Tensor:
    """Return where boxes (N, 4) of a photo of `size` (width, height) lie once it is turned as EXIF says, 1 to 8."""
    width, height = size
    x, y = boxes_xyxy[:, 0::2], boxes_xyxy[:, 1::2]
    if orientation in (2, 3, 7, 8):
        x = width - x
    if orientation in (3, 4, 6, 7):
        y = height - y
    if orientation >= 5:
        x, y = y, x
    return torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)


def summary(name: str, root: Path) -> str:
    """Read a whole set and say what it has."""
    found = load(name, root, val_fraction=0.0)
    items = [item for split in found.splits.values() for item in split]
    boxes = sum(len(item.labels) for item in items)
    return f"{len(items)} photos, {boxes} boxes, {len(found.classes)} classes, every annotation can be read"


@dataclass(frozen=True, kw_only=True)
class DetectionDatasetSource(DatasetSource[DetectionDataset]):
    """A data set for detection."""

    kind = CUSTOM
    contents = "photos with boxes"

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
        """Read the data set below `root`, or the user's own from `path`; see the function `load`."""
        if self.is_custom and path is None:
            raise ConfigError("data boxes: path is missing", f"with name: boxes, name your own {LAYOUTS}")
        return load(self.name, root, path, val_fraction)


SCENES = DetectionDatasetSource(
    name="scenes",
    summary="800 generated pictures of 224x224 px with boxes, 10 classes of shapes; built in",
    license="MIT, as cvlab",
    size=DatasetSize(
        train_images=scenes.COUNTS["train"],
        test_images=scenes.COUNTS["test"],
        image_px=generator.SIZE_PX,
        channels=3,
        num_classes=len(SHAPES),
    ),
    ready=scenes.SET.ready,
    check=scenes.SET.check,
)
BOXES = DetectionDatasetSource(
    name=CUSTOM,
    summary="your own photos with boxes, in VOC's, YOLO's or COCO's layout; data.path names them",
    license="yours",
    size=DatasetSize(train_images=1, test_images=0, image_px=1, channels=3, num_classes=1),
    ready=lambda _: False,
    check=lambda _: "your own, read and checked by every run",
    is_custom=True,
)
