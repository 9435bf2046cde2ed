"""scenes, the built-in set with boxes: 224 px pictures of shapes in VOC's layout, generated once, kept, checksummed.

`<root>/scenes-v1/` holds JPEGImages/*.png, Annotations/*.xml, ImageSets/Main/*.txt, scenes.json (for every picture its
shapes in words: shape, colour, size, position) and sha256.json. data/scenery.py draws them.
"""

import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from cvlab import console, data, durable
from cvlab.data import boxwriters, scenery
from cvlab.errors import CvlabError, DataError

VERSION = 1
COUNTS = {"train": 480, "val": 120, "test": 200}
SEEDS = {"train": 1, "val": 2, "test": 3}
FOLDER = f"scenes-v{VERSION}"
SUMS, WORDS = "sha256.json", "scenes.json"
HINT = "remove that folder; the next run generates it again"


def folder(root: Path) -> Path:
    """Return the folder of the set: kept and verified, else generated; a temporary one where nothing can be kept."""
    if ready(root):
        verify(root / FOLDER)
        return root / FOLDER
    console.say(f"generating scenes, {sum(COUNTS.values())} pictures, once")
    try:
        return _keep(root)
    except (OSError, CvlabError) as error:
        console.detail(f"scenes is not kept: {error}")
        return _temporary()


def ready(root: Path) -> bool:
    """Whether the set was generated before."""
    return (root / FOLDER / SUMS).is_file()


def check(root: Path) -> str:
    """Compare what is kept with its checksums."""
    if not ready(root):
        return "built in, generated at first use"
    return f"{verify(root / FOLDER)} files equal to their checksums"


def _keep(root: Path) -> Path:
    """Generate the set beside its place, then move it there in one step."""
    with data.scratch(root) as scratch:
        made = scratch / FOLDER
        write(made)
        target = root / FOLDER
        if target.exists() and not ready(root):
            shutil.rmtree(target)
        try:
            made.replace(target)
        except OSError:
            if not ready(root):  # else another process was quicker, with the same pictures
                raise
        durable.sync_directory(root)
        return target


@functools.cache
def _temporary() -> Path:
    """Generate the set for this process only."""
    made = tempfile.TemporaryDirectory(prefix="cvlab-scenes-")
    _alive.append(made)
    write(Path(made.name))
    return Path(made.name)


_alive: list["tempfile.TemporaryDirectory[str]"] = []  # removed when the process ends


def write(target: Path) -> None:
    """Generate all pictures and write them into a folder, the checksums last."""
    digests: dict[str, str] = {}
    for name, content in _files():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        digests[name] = hashlib.sha256(content).hexdigest()
    durable.write_text(target / SUMS, json.dumps(digests))


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield every file of the set: its path in the folder, and its content."""
    words: dict[str, list[tuple[str, ...]]] = {}
    for split, count in COUNTS.items():
        names = [f"{split}_{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            scene = scenery.draw(SEEDS[split], number)
            words[name] = [thing.words for thing in scene.things]
            yield f"JPEGImages/{name}.png", _png(scene)
            yield f"Annotations/{name}.xml", _xml(scene, name).encode()
        yield f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in names).encode()
    yield WORDS, json.dumps(words).encode()


def _png(scene: scenery.Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene.picture.numpy()).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _xml(scene: scenery.Scene, name: str) -> str:
    boxes_xyxy = torch.tensor([thing.box_xyxy for thing in scene.things]).view(-1, 4)
    names = [thing.shape for thing in scene.things]
    return boxwriters.write_voc_xml(boxes_xyxy, names, (scenery.SIZE_PX, scenery.SIZE_PX), f"{name}.png")


def verify(kept: Path) -> int:
    """Compare every file of a folder with its checksum; return how many there are."""
    try:
        digests = json.loads((kept / SUMS).read_bytes())
        for name, digest in digests.items():
            if hashlib.sha256((kept / name).read_bytes()).hexdigest() != digest:
                raise DataError(f"{kept / name}: damaged, its checksum differs", HINT)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{kept}: cannot be read: {error}", HINT) from error
    return len(digests)
