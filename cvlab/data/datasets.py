"""The table of data sets: by name, how each is found, loaded, checked and fetched.

Every task has a subclass of `DatasetSource` whose `load` says which options it takes and what it returns:
`ImageDatasetSource`, `DetectionDatasetSource` and `CaptionDatasetSource`, each beside the data set that it loads.
A data set with boxes and captions has a row of each kind under one name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from cvlab import registry
from cvlab.errors import ConfigError

Dataset = TypeVar("Dataset", covariant=True)

BY_KIND = {
    "images": {
        "cifar10": "cvlab.experiments.classification.data.cifar:CIFAR10",
        "cifar100": "cvlab.experiments.classification.data.cifar:CIFAR100",
        "mnist": "cvlab.experiments.classification.data.mnist:MNIST",
        "mnist5k": "cvlab.experiments.classification.data.mnist:MNIST5K",
        "fashion_mnist": "cvlab.experiments.classification.data.mnist:FASHION_MNIST",
        "svhn": "cvlab.experiments.classification.data.svhn:SOURCE",
        "imagenette": "cvlab.experiments.classification.data.imagenette:SOURCE",
        "scenes10": "cvlab.experiments.classification.data.scenes10:SOURCE",
        "folder": "cvlab.experiments.classification.data.folder:SOURCE",
    },
    "boxes": {
        "scenes": "cvlab.experiments.detection.data.scenes:SCENES",
        "fruit": "cvlab.experiments.detection.data.downloads:FRUIT",
        "bccd": "cvlab.experiments.detection.data.downloads:BCCD",
        "voc07": "cvlab.experiments.detection.data.downloads:VOC07",
        "everyday": "cvlab.experiments.detection.data.everyday:SOURCE",
        "coco": "cvlab.experiments.detection.data.published_coco:COCO",
        "coco_people": "cvlab.experiments.detection.data.published_coco:COCO_PEOPLE",
        "boxes": "cvlab.experiments.detection.data.custom:BOXES",
    },
    "captions": {
        "flickr8k": "cvlab.experiments.captioning.dataset:FLICKR8K",
        "coco": "cvlab.experiments.captioning.dataset:COCO",
        "coco_people": "cvlab.experiments.captioning.dataset:COCO_PEOPLE",
        "scene_captions": "cvlab.experiments.captioning.dataset:SCENE_CAPTIONS",
        "captions": "cvlab.experiments.captioning.dataset:CAPTIONS",
    },
}
CONTENTS = {"images": "images with a class each", "boxes": "photos with boxes", "captions": "captioned photos"}
DATASETS = tuple(dict.fromkeys(name for table in BY_KIND.values() for name in table))


FetchFn = Callable[[Path, Path | None, bool], None]  # see `DatasetSource.fetch`


@dataclass(frozen=True)
class DatasetSize:
    """The size of a data set, known without loading it."""

    train_images: int
    test_images: int
    image_px: int
    channels: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """What is known about a data set without loading it.

    Attributes:
        ready: Whether the data set lies below a root folder; quick.
        is_builtin: Whether nothing has to be fetched: cvlab generates the data set, or it is the user's own.
        is_custom: Whether the files are the user's own and lie where the configuration says.
    """

    name: str
    summary: str
    license: str
    size: DatasetSize
    ready: Callable[[Path], bool]
    is_builtin: bool = False
    is_custom: bool = False

    def state(self, root: Path) -> str:
        """Describe whether the data set can be used."""
        if self.ready(root):
            return "ready"
        return "your own" if self.is_custom else "built in" if self.is_builtin else "not on the disk"


@dataclass(frozen=True, kw_only=True)
class DatasetSource(DatasetDescription, ABC, Generic[Dataset]):
    """One row of the table: a description of `cvlab.data.descriptions`, and how to load, check and fetch the data set.

    Attributes:
        kind: One of `BY_KIND`; also the name of the user's own data set of this kind.
        check: Verifies the files below a root folder and returns one line about them; raises DataError.
        fetch: Called with the root folder, an origin (a local copy, or None for the network) and whether to wait as
            long as the download takes. None for a built-in data set, which is generated when it is loaded.
    """

    kind: ClassVar[str]

    check: Callable[[Path], str]
    fetch: FetchFn | None = None

    @abstractmethod
    def load(self, root: Path, *args: Any, **options: Any) -> Dataset:
        """Read and verify the data set below `root`; subclasses declare their options. Raises DataError."""


AnySource = DatasetSource[Any]
Source = TypeVar("Source", bound=AnySource)


def get_all(name: str) -> list[AnySource]:
    """Return the data set called `name`, once for each kind that it is of. Raises ConfigError with the closest name."""
    if name not in DATASETS:
        raise registry.unknown_name_error("data set", name, DATASETS)
    return [registry.import_name(table[name]) for table in BY_KIND.values() if name in table]


def get(name: str) -> AnySource:
    """Return the data set called `name`, as the first of its kinds: its files and how they are fetched are the same."""
    return get_all(name)[0]


def get_of_kind(name: str, source_type: type[Source]) -> Source:
    """Return the data set called `name`, which must be of the kind of `source_type`. Raises ConfigError otherwise."""
    require_kind(name, source_type.kind)
    source = registry.import_name(BY_KIND[source_type.kind][name])
    assert isinstance(source, source_type), name
    return source


def contents(name: str) -> str:
    """Return what a data set has: `photos with boxes and captioned photos`."""
    return " and ".join(CONTENTS[kind] for kind, table in BY_KIND.items() if name in table)


def require_kind(name: str, kind: str) -> None:
    """Raise ConfigError unless `name` is a data set of a kind; no data set's module is imported."""
    if name in BY_KIND[kind]:
        return
    error = registry.unknown_name_error("data set", name, BY_KIND[kind])
    if name not in DATASETS:
        raise error
    raise ConfigError(f"data set {name!r} has {contents(name)}, {CONTENTS[kind]} are needed here", error.hint)


def check_kind(name: str, kind: str) -> None:
    """Check that `name` is a data set of a kind. Raises ValueError, for the validators of configurations."""
    try:
        require_kind(name, kind)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def check_path(name: str | None, path: str | None, photo_set: str) -> None:
    """Check that the data set with the user's photos has a path , and no other one. Raises ValueError."""
    if name == photo_set and path is None:
        raise ValueError(f"name: {photo_set} requires a path")
    if name != photo_set and path is not None:
        raise ValueError(f"only name: {photo_set} takes a path; for another data set set path=null")
