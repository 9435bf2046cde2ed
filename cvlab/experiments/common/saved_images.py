"""Read the images back that a run has written: those below its run directory, and nothing that a link leads to."""

import re
from pathlib import Path

from PIL import Image

from cvlab.data import photos
from cvlab.data.photo_paths import MAX_FILE_BYTES
from cvlab.runs.run_dir import RunDir
from cvlab.storage import atomic, regular_files

FRAMES = "images/frames"


def load(run: RunDir, name: str) -> Image.Image:
    """Read an image of a run by its name in the run directory.

    Raises:
        RunDirError: It cannot be read, is not a regular file, or a part of its path is a link.
        DataError: It cannot be decoded.
    """
    path = run.path / name
    try:
        content = regular_files.read_below(run.path, name, MAX_FILE_BYTES)
    except OSError as error:
        raise atomic.disk_error(path, error) from error
    return photos.decode(content, path)


def save_frame(run: RunDir, prefix: str, step: int, content: bytes) -> None:
    """Write the intermediate image of a step."""
    run.folder("images")
    run.folder(FRAMES)
    run.write_bytes(f"{FRAMES}/{prefix}{step:06d}.png", content)


def load_frames(run: RunDir, prefix: str) -> list[tuple[int, Image.Image]]:
    """Return the intermediate images with their steps, ascending. Raises as `load`."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{6,9})\.png")
    names = sorted(path.name for path in Path(run.path, FRAMES).glob("*.png"))
    return [(int(match[1]), load(run, f"{FRAMES}/{name}")) for name in names if (match := pattern.fullmatch(name))]
