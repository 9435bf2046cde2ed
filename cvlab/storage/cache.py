"""The folder of all data, and how a downloaded folder gets there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cvlab.storage import atomic


def data_root() -> Path:
    """Return the folder of all data: $CVLAB_DATA, else `cvlab` in the user's cache directory."""
    chosen = os.environ.get("CVLAB_DATA")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "cvlab"


@contextlib.contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """Give a folder beside the data, gone afterwards. RunDirError where the disk refuses what is done in it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as made:
            yield Path(made)
    except OSError as error:
        raise atomic.disk_error(root, error, "free space, or choose another place with CVLAB_DATA") from error


def install_folder(made: Path, target: Path) -> None:
    """Move a folder that is whole to its place in one step; what stood there goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()  # what it points to is somebody else's
    elif target.exists():
        shutil.rmtree(target)
    made.replace(target)
    atomic.sync_directory(target.parent)
