"""The folder of data sets and weights, and how downloaded folders are put into it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cvlab import portability
from cvlab.storage import atomic


def data_root() -> Path:
    """Return the folder of data sets and weights: $CVLAB_DATA, else `cvlab` in the user's cache directory."""
    folder = os.environ.get("CVLAB_DATA")
    return Path(folder) if folder else user_cache()


def user_cache() -> Path:
    """Return `cvlab` in the user's cache directory. RuntimeError if the user has no home directory."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "cvlab"


@contextlib.contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """Create a folder below `root`, removed afterwards; RunDirError if the disk cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder:
            yield Path(folder)
    except OSError as error:
        raise atomic.disk_error(root, error, "free space, or choose another folder with CVLAB_DATA") from error


def install_folder(complete: Path, target: Path) -> None:
    """Move a complete folder to `target` in one step; what was there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()  # but not what it points to
    elif target.exists():
        shutil.rmtree(target)
    portability.replace(complete, target)
    atomic.sync_directory(target.parent)
