"""Images in the feature space of a network: nearest neighbors, and a map by t-SNE with thumbnails."""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from cvlab.experiments.common import embedding
from cvlab.experiments.interpretability import image_sets
from cvlab.ops import tsne
from cvlab.reports import colors, fonts, images

MIN_IMAGES = 5  # of a map
NUM_QUERIES = 10  # rows of the sheet of neighbors
MAP_PX, MIN_MAP_PX, LEGEND_PX, TEXT_PX, LINE_PX = 1400, 480, 240, 15, 26
THUMBNAIL_RANGE = (14, 80)  # pixels of a thumbnail on the map
COVERED = 0.45  # of the area of the map, by the thumbnails of all images
Color = tuple[int, int, int]


@dataclass(frozen=True)
class EmbeddedSet:
    """Images with their features.

    Attributes:
        title: What the set is.
        features: (N, F), of unit length.
        pictures: N thumbnails.
        names: What the images are called.
        labels: Their classes, int64 (N,), or None.
        classes: Names of the classes.
    """

    title: str
    features: Tensor
    pictures: Sequence[Image.Image]
    names: Sequence[str]
    labels: Tensor | None
    classes: tuple[str, ...]

    def caption(self, index: int) -> str:
        """Return the class of an image, or its name if it has none."""
        return self.names[index] if self.labels is None else self.classes[int(self.labels[index])]


def same_class_fraction(space: EmbeddedSet) -> float:
    """Return how many of the images, as a fraction, have a nearest neighbor of their class; N > 1, with labels."""
    assert space.labels is not None
    similarity = (space.features @ space.features.T).fill_diagonal_(-math.inf)
    return float((space.labels[similarity.argmax(1)] == space.labels).double().mean())


def draw_neighbors(
    space: EmbeddedSet, count: int, queries: Sequence[tuple[str, Image.Image, Tensor]] = ()
) -> Image.Image:
    """Draw rows of an image and those of the set that are nearest to it by cosine similarity.

    Args:
        space: The set.
        count: Number of neighbors.
        queries: Caption, picture and features (F,) of photos; none: images of the set at even intervals.
    """
    rows = []
    if queries:
        for caption, picture, features in queries[:NUM_QUERIES]:
            rows.append(
                [(caption, picture), *_neighbor_tiles(space, embedding.nearest(space.features, features, count))]
            )
        return images.neighbor_sheet(rows, f"photos and the nearest images of {space.title}")
    for index in image_sets.evenly_spaced(len(space.pictures), NUM_QUERIES):
        pairs = embedding.nearest(space.features, space.features[index], count + 1)
        others = [(other, similarity) for other, similarity in pairs if other != index][:count]
        rows.append([(space.caption(index), space.pictures[index]), *_neighbor_tiles(space, others)])
    return images.neighbor_sheet(rows, f"images of {space.title} and the nearest others")


def _neighbor_tiles(space: EmbeddedSet, pairs: Sequence[tuple[int, float]]) -> list[tuple[str, Image.Image]]:
    return [(f"{similarity:.2f} {space.caption(k)}", space.pictures[k]) for k, similarity in pairs]


def draw_map(
    space: EmbeddedSet, perplexity: float, steps: int, on_step: Callable[[int], None]
) -> tuple[Image.Image, Tensor, float]:
    """Place the images by t-SNE and draw them where they lie, with a frame in the color of their class.

    Args:
        space: At least MIN_IMAGES images.
        perplexity: See `tsne.tsne`.
        steps: Steps of gradient descent.
        on_step: Called before each step; may raise to stop.

    Returns:
        The picture, the positions (N, 2), and the Kullback-Leibler divergence.
    """
    positions, divergence = tsne.tsne(space.features, perplexity, steps, on_step)
    num = len(space.pictures)
    low, high = THUMBNAIL_RANGE
    thumbnail_px = round(min(high, max(low, math.sqrt(COVERED * MAP_PX**2 / num))))
    class_colors = _class_colors(len(space.classes)) if space.labels is not None else []
    low_corner = positions.amin(0)
    spans = positions.amax(0) - low_corner
    corners = (positions - low_corner) / spans.max().clamp(min=1e-12) * (MAP_PX - thumbnail_px)
    width, height = (max(MIN_MAP_PX, round(float(side)) + thumbnail_px) for side in corners.amax(0))
    sheet = Image.new("RGB", (width + (LEGEND_PX if class_colors else 0), height), "white")
    for index, (x, y) in enumerate(corners.round().int().tolist()):
        tile = space.pictures[index].resize((thumbnail_px, thumbnail_px), Image.Resampling.BICUBIC)
        if class_colors:
            assert space.labels is not None
            border = max(2, thumbnail_px // 12)
            tile = ImageOps.expand(ImageOps.crop(tile, border), border, class_colors[int(space.labels[index])])
        sheet.paste(tile, (x, y))
    if class_colors:
        _draw_legend(sheet, width, space, class_colors)
    used = min(perplexity, (num - 1) / 3)
    title = f"t-SNE of {num} images of {space.title}: KL divergence {divergence:.3f}, perplexity {used:.3g}"
    return images.titled(sheet, title), positions, divergence


def _class_colors(count: int) -> list[Color]:
    """Return a color for each class: those of curves, or of more classes the hues in order, light and dark."""
    if count <= len(colors.LIGHT):
        return [(int(c[1:3], 16), int(c[3:5], 16), int(c[5:7], 16)) for c in colors.LIGHT[:count]]
    rgb = [colorsys.hls_to_rgb(k / count, (0.36, 0.56)[k % 2], 0.9) for k in range(count)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in rgb]


def _draw_legend(sheet: Image.Image, left: int, space: EmbeddedSet, class_colors: Sequence[Color]) -> None:
    assert space.labels is not None
    pen = ImageDraw.Draw(sheet)
    for row, index in enumerate(space.labels.unique().tolist()[: (sheet.height - 10) // LINE_PX]):
        top = row * LINE_PX + 10
        pen.rectangle((left + 16, top, left + 16 + TEXT_PX, top + TEXT_PX), fill=class_colors[index])
        fonts.draw(pen, (left + 26 + TEXT_PX, top - 2), fonts.printable(f"{space.classes[index]:.24}"), TEXT_PX)


def to_csv_rows(space: EmbeddedSet, positions: Tensor) -> list[list[object]]:
    """Return the header and a row for each image: its name, class and position."""
    labels = [""] * len(space.names) if space.labels is None else [space.classes[k] for k in space.labels.tolist()]
    rows: list[list[object]] = [["image", "class", "x", "y"]]
    for name, label, (x, y) in zip(space.names, labels, positions.tolist(), strict=True):
        rows.append([name, label, f"{x:.6g}", f"{y:.6g}"])
    return rows


@torch.inference_mode()
def embed(embedder: embedding.Embedder, inputs: Tensor) -> Tensor:
    """Return the features (N, F), float32 of unit length on the CPU, of inputs (N, C, S, S) in [0, 1]."""
    features = embedder.features(embedder.model.module.normalize(inputs))
    return torch.nn.functional.normalize(features.float(), dim=1).cpu()
