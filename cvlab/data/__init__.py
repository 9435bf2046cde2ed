"""Data sets by name, where they lie, and what to do where one is not on the disk."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvlab import durable, lookup

SETS = {
    "cifar10": "cvlab.data.cifar10:SOURCE",
    "scenes10": "cvlab.data.scenes10:SOURCE",
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
    built-in set needs no fetching: it is generated.
    """

    name: str
    summary: str
    licence: str
    size: Size
    ready: Callable[[Path], bool]
    load: Callable[[Path], Any]
    check: Callable[[Path], str]
    fetch: Callable[[Path, Path | None, bool], None] | None = None

    @property
    def builtin(self) -> bool:
        """Whether cvlab makes the set itself."""
        return self.fetch is None


def root() -> Path:
    """Return the folder of all data: $CVLAB_DATA, else `cvlab` in the user's cache directory."""
    chosen = os.environ.get("CVLAB_DATA")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "cvlab"


@contextlib.contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """Give a folder beside the data, gone afterwards. RunDirError where the disk refuses what is done in it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as made:
            yield Path(made)
    except OSError as error:
        raise durable.disk_error(root, error, "free space, or choose another place with CVLAB_DATA") from error


def find(name: str) -> Source:
    """Return the data set called `name`; ConfigError with the nearest name otherwise."""
    source: Source = lookup.find("data set", name, SETS)
    return source
