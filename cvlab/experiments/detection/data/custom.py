"""The user's own detection data set, `boxes`: a folder or file in VOC's, YOLO's or COCO's format."""

from dataclasses import dataclass
from pathlib import Path

from cvlab import console
from cvlab.data import descriptions
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.data import coco, voc, yolo
from cvlab.experiments.detection.data.annotations import AnnotationSet
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionDatasetSource, from_annotations

FORMATS = (
    "VOC (Annotations/*.xml and JPEGImages), YOLO (data.yaml, or images/train and labels/train) "
    "or COCO (a JSON file, or annotations/*.json and images)"
)


def read(path: Path) -> AnnotationSet:
    """Read a folder or file in whichever format it has. DataError if it has none of them."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder", f"name {FORMATS}")
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        annotation_set = yolo.read_path(path)
    elif path.is_dir() and voc.matches(path):
        annotation_set = voc.read_folder(path)
    elif path.is_dir() and yolo.matches(path) and (yolo.has_classes(path) or not coco.matches(path)):
        annotation_set = yolo.read_path(path)
    elif coco.matches(path):
        annotation_set = coco.read_path(path)
    else:
        raise DataError(f"{path}: in none of the layouts that are known", f"name {FORMATS}")
    console.debug(f"{path}: read as {annotation_set.format}")
    return annotation_set


@dataclass(frozen=True, kw_only=True)
class CustomSource(DetectionDatasetSource):
    """The data set that lies where the configuration's `path` says."""

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.2) -> DetectionDataset:
        """Read the data set at `path`; see `DetectionDatasetSource.load`."""
        if path is None:
            raise ConfigError(f"data {self.name}: path is missing", f"with name: {self.name}, name your own {FORMATS}")
        return from_annotations(self.name, read(Path(path)), val_fraction)


BOXES = CustomSource(
    **descriptions.of_source("boxes", "boxes"),
    check=lambda _: "your own, read and checked by every run",
)
