"""scenes10, the built-in data set: 32 px images of one shape each, 10 classes, generated once, cached and checksummed.

The class is the shape; its color, size, position, tilt and texture, the background and a distractor spot are random. A
linear model stays below 50 % accuracy, a small convolutional network exceeds 90 % (test_scenes10.py).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvlab import console
from cvlab.data import descriptions
from cvlab.data.scenes.render import COLORS, SHAPES, blend, pixel_grid, shape_coverage, stripes
from cvlab.errors import CvlabError, DataError
from cvlab.experiments.classification.data.images import ImageDataset, ImageDatasetSource
from cvlab.storage import atomic

VERSION = 1
SIZE_PX = 32
NUM_TRAIN, NUM_TEST = 12_500, 2_500
CHUNK = 2_500
FOLDER = f"scenes10-v{VERSION}"
HINT = "remove that folder; the next run generates it again"


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` images, a pure function of the seed: uint8 (count, 32, 32, 3) and int64 labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % len(SHAPES)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    x, y = pixel_grid(SIZE_PX)
    palette = torch.tensor(list(COLORS.values()))
    color_index = torch.randint(len(palette), (count,), generator=generator)
    other_index = (color_index + torch.randint(1, len(palette), (count,), generator=generator)) % len(palette)
    color = (palette[color_index] + uniform(-0.12, 0.12, 3)).clamp(0, 1)
    background = (0.25 * palette[other_index] + 0.75 * uniform(0.1, 0.9, 3)).clamp(0, 1)
    is_similar = (color - background).abs().sum(1, keepdim=True) < 0.6
    background = torch.where(is_similar, (color + 0.5) % 1, background)
    wave = stripes(x, y, uniform(0, 3.14), uniform(1, 6), uniform(0, 6.28))
    canvas = blend(torch.zeros(count, 3, SIZE_PX, SIZE_PX), torch.ones(1, 1, 1), background, wave, uniform(0, 0.4))
    spot = shape_coverage("circle", x, y, uniform(-1, 1, 2), uniform(0.05, 0.25), torch.zeros(count), SIZE_PX)
    canvas = blend(canvas, spot, uniform(0, 1, 3), wave, torch.zeros(count))
    texture = stripes(x, y, uniform(0, 3.14), uniform(2, 8), uniform(0, 6.28))
    center, radius, tilt, contrast = uniform(-0.25, 0.25, 2), uniform(0.42, 0.75), uniform(-0.3, 0.3), uniform(0, 0.4)
    for label, shape in enumerate(SHAPES):
        mask = labels == label
        coverage = shape_coverage(shape, x, y, center[mask], radius[mask], tilt[mask], SIZE_PX)
        canvas[mask] = blend(canvas[mask], coverage, color[mask], texture[mask], contrast[mask])
    noisy = canvas + 0.03 * torch.randn(canvas.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous(), labels


def _draw_chunks(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chunks = [draw(min(CHUNK, count - start), seed + start) for start in range(0, count, CHUNK)]
    images = torch.cat([images for images, _ in chunks])
    return images.numpy(), torch.cat([labels for _, labels in chunks]).numpy()


def generate() -> dict[str, np.ndarray]:
    """Generate the whole data set as arrays by name."""
    train_images, train_labels = _draw_chunks(NUM_TRAIN, seed=1_000_000)
    test_images, test_labels = _draw_chunks(NUM_TEST, seed=2_000_000)
    return {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def ready(root: Path) -> bool:
    """Return whether the data set is cached."""
    return (root / FOLDER / "sha256.json").is_file()


def _store(root: Path, arrays: dict[str, np.ndarray]) -> None:
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        atomic.write(folder / f"{name}.npy", lambda file, array=array: np.save(file, array))  # type: ignore[misc]
    atomic.write_text(folder / "sha256.json", json.dumps({name: _digest(array) for name, array in arrays.items()}))


def _read(root: Path) -> dict[str, np.ndarray]:
    folder = root / FOLDER
    try:
        digests = json.loads((folder / "sha256.json").read_bytes())
        arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in digests}
    except (OSError, ValueError, AttributeError, EOFError) as error:
        raise DataError(f"{folder}: cannot be read: {error}", HINT) from error
    for name, array in arrays.items():
        if _digest(array) != digests[name]:
            raise DataError(f"{folder / name}.npy: damaged, its checksum differs", HINT)
    return arrays


def load(root: Path) -> ImageDataset:
    """Read the data set, or generate and cache it; if it cannot be cached it is generated each time."""
    if ready(root):
        arrays = _read(root)
    else:
        arrays = generate()
        try:
            _store(root, arrays)
        except (OSError, CvlabError) as error:
            console.debug(f"scenes10 is not cached: {error}")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return ImageDataset(name="scenes10", classes=tuple(SHAPES), **tensors)  # type: ignore[arg-type]


def check(root: Path) -> str:
    """Compare the cached files with their checksums. Raises DataError."""
    if not ready(root):
        return "built in, generated at first use"
    return f"{len(_read(root))} files equal to their checksums"


SOURCE = ImageDatasetSource(
    **descriptions.of_source("images", "scenes10"),
    read=load,
    check=check,
)
