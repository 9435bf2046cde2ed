"""What a data set consists of: samples before and after augmentation, its classes, sizes, and copies of images."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cvlab.data import photos
from cvlab.reports import images

MAX_EMBEDDED = 2000  # images of a data set whose features are compared
NEAR = 0.97  # cosine similarity of features from which on two images are called near copies
TILE_PX = 200
MAX_COPIES = 50  # that are listed


@dataclass(frozen=True)
class DataSample:
    """An image of the training split: as it is, and as training may see it; None if it is not augmented."""

    caption: str
    image: Image.Image
    augmented: Image.Image | None = None


@dataclass(frozen=True)
class Item:
    """One image of a data set: its split, its name, and a function that reads it."""

    split: str
    name: str
    read: Callable[[], Image.Image]
    digest: str


@dataclass(frozen=True)
class DataOverview:
    """What is shown of a data set.

    Attributes:
        name: Its name.
        num_images: By split.
        classes: Number of images, or boxes, of each class by split; empty if there are no classes.
        sizes: Width and height of its images in pixels, with their number.
        samples: Some training images.
        items: All images, for the search for copies.
        notes: What was noticed.
    """

    name: str
    num_images: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]]
    sizes: Mapping[tuple[int, int], int]
    samples: Sequence[DataSample]
    items: Sequence[Item]
    notes: Sequence[str] = field(default=())


def digest_bytes(content: bytes) -> str:
    """Return a digest of an image's content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def photo_items(paths: Mapping[str, Sequence[Path]]) -> tuple[list[Item], Counter[tuple[int, int]]]:
    """Return the photos of a data set, given by split, and how many there are of each width and height in pixels."""
    items, sizes = [], Counter[tuple[int, int]]()
    for split, files in paths.items():
        for path in files:
            with Image.open(path) as image:
                sizes[image.size] += 1
            items.append(Item(split, path.name, partial(photos.load, path), digest_bytes(path.read_bytes())))
    return items, sizes


def exact_copies(items: Sequence[Item]) -> list[list[Item]]:
    """Return the groups of images with the same content."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.digest].append(item)
    return [members for members in groups.values() if len(members) > 1]


def describe(overview: DataOverview, near: Sequence[tuple[Item, Item, float]] | None) -> dict[str, Any]:
    """Return an overview as a JSON object; `near` are pairs of near copies, None if they were not searched."""
    widths, heights = ([side[axis] for side, count in overview.sizes.items() for _ in range(count)] for axis in (0, 1))
    copies = exact_copies(overview.items)

    def row(item: Item) -> dict[str, str]:
        return {"split": item.split, "image": item.name}

    return {
        "data": overview.name,
        "images": dict(overview.num_images),
        "classes": {split: dict(counts) for split, counts in overview.classes.items()},
        "sizes": {
            "width": [min(widths), sorted(widths)[len(widths) // 2], max(widths)] if widths else [],
            "height": [min(heights), sorted(heights)[len(heights) // 2], max(heights)] if heights else [],
            "most_frequent": [[*size, count] for size, count in Counter(overview.sizes).most_common(5)],
        },
        "copies": [[row(item) for item in members] for members in copies[:MAX_COPIES]],
        "num_copies": len(copies),
        "num_copies_across_splits": sum(len({item.split for item in members}) > 1 for members in copies),
        "near_copies": None
        if near is None
        else [
            {"similarity": similarity, "images": [row(one), row(other)]} for one, other, similarity in near[:MAX_COPIES]
        ],
        "notes": list(overview.notes),
    }


def sheet(overview: DataOverview) -> Image.Image:
    """Draw the samples, each beside what augmentation makes of it."""
    tiles = []
    for sample in overview.samples:
        tiles.append((sample.caption, sample.image))
        if sample.augmented is not None:
            tiles.append(("augmented", sample.augmented))
    return images.panel(tiles, f"training images of {overview.name}", max_tile_px=TILE_PX)


def find_near_copies(overview: DataOverview) -> list[tuple[Item, Item, float]] | None:
    """Return pairs of near copies by the features of the bundled model; None of more than MAX_EMBEDDED images.

    Exact copies are left out.
    """
    import torch

    from cvlab.experiments.common import embedding
    from cvlab.models import pretrained

    items = list({item.digest: item for item in overview.items}.values())
    if not items or len(overview.items) > MAX_EMBEDDED:
        return None
    embedder = embedding.build(pretrained.build())
    batches = [items[k : k + embedding.BATCH_SIZE] for k in range(0, len(items), embedding.BATCH_SIZE)]
    features = torch.cat([embedder([item.read() for item in batch]) for batch in batches])
    return [(items[i], items[j], s) for i, j, s in embedding.near_pairs(features, NEAR)]
