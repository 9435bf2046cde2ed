"""Data sets by name, where they lie, and what to do where one is not on the disk."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.errors import ConfigError

KINDS = {"images": "images with a class each", "boxes": "photos with boxes", "captions": "photos with sentences"}
DATASETS = {
    "cifar10": "cvlab.experiments.classification.data.cifar10:SOURCE",
    "scenes10": "cvlab.experiments.classification.data.scenes10:SOURCE",
    "scenes": "cvlab.experiments.detection.data.dataset:SCENES",
    "fruit": "cvlab.experiments.detection.data.downloads:FRUIT",
    "bccd": "cvlab.experiments.detection.data.downloads:BCCD",
    "voc07": "cvlab.experiments.detection.data.downloads:VOC07",
    "everyday": "cvlab.experiments.detection.data.everyday:SOURCE",
    "boxes": "cvlab.experiments.detection.data.dataset:BOXES",
    "flickr8k": "cvlab.experiments.captioning.dataset:FLICKR8K",
    "scene_sentences": "cvlab.experiments.captioning.dataset:SCENE_SENTENCES",
    "captions": "cvlab.experiments.captioning.dataset:CAPTIONS",
}


@dataclass(frozen=True)
class Size:
    """How much a set of images has, known without loading it."""

    train_images: int
    test_images: int
    image_px: int
    channels: int
    num_classes: int


@dataclass(frozen=True)
class Source:
    """A data set: how to find, load, check and get it.

    `ready(root)` is quick and says whether it is there; `load(root)` reads and verifies it; `check(root)` verifies and
    returns a line; `fetch(root, origin, patient)` gets it from the network, or from `origin` if that is given. A
    built-in set needs no fetching: it is generated. `kind` says what `load` returns: `images` with a class each, or
    photos with `boxes`. A set that is the user's `own` lies where the configuration says.
    """

    name: str
    summary: str
    licence: str
    size: Size
    ready: Callable[[Path], bool]
    load: Callable[[Path], Any]
    check: Callable[[Path], str]
    fetch: Callable[[Path, Path | None, bool], None] | None = None
    kind: str = "images"
    own: bool = False

    @property
    def builtin(self) -> bool:
        """Whether nothing has to be fetched: cvlab makes the set itself, or the user has it."""
        return self.fetch is None

    def state(self, root: Path) -> str:
        """Say whether the set is there."""
        if self.ready(root):
            return "ready"
        return "your own" if self.own else "built in" if self.builtin else "not on the disk"


def names(kind: str) -> list[str]:
    """Return the names of the sets of a kind."""
    return [name for name in DATASETS if get(name).kind == kind]


def kind_error(name: str, kind: str) -> ConfigError | None:
    """Return what is wrong with a name where a set of `kind` is needed, or None."""
    if name not in DATASETS:
        return registry.unknown_name_error("data set", name, names(kind))
    found = get(name).kind
    if found == kind:
        return None
    hint = registry.unknown_name_error("data set", name, names(kind)).hint
    return ConfigError(f"data set {name!r} has {KINDS[found]}, {KINDS[kind]} are needed here", hint)


def get(name: str) -> Source:
    """Return the data set called `name`; ConfigError with the nearest name otherwise."""
    source: Source = registry.get("data set", name, DATASETS)
    return source
