"""The images of a run inside a page: reduced, as data URIs, each once; and the thumbnail of a run."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvlab.reports import colors, curves, metrics, tables
from cvlab.runs.records import Row, read_summary
from cvlab.runs.results import Column, read_columns
from cvlab.storage import atomic

MAX_IMAGES, MAX_PX = 48, 1400  # of a page; the files in the run directory have their full size
MAX_GIF_BYTES = 2_000_000
QUALITY = 85
WIDE_RATIO, WIDE_PX = 1.4, 1000  # width to height, and width, of an image that takes the width of the page
SUFFIXES = (".png", ".gif")
PREVIEW = "images/preview.png"  # an intermediate state of a result
THUMBNAIL = "thumbnail.png"
THUMBNAIL_SIZE = (240, 96)  # pixels; shown at half of that
MAX_THUMBNAIL_BYTES = 100_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class EmbeddedImage:
    """An image inside a page: its title, its bytes as a data URI, its size in pixels."""

    name: str
    source: str
    width: int
    height: int

    @property
    def is_wide(self) -> bool:
        """Whether the image takes the width of the page."""
        return self.width > WIDE_RATIO * self.height and self.width >= WIDE_PX


@dataclass
class ImageGroup:
    """Images that belong together, with a description, and further files that the page does not show."""

    title: str = ""
    description: str = ""
    images: list[EmbeddedImage] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class ImageGroups:
    """Collects the images of a run, those of one result together, until the page has MAX_IMAGES.

    Attributes:
        groups: The groups.
        num_omitted: Number of images that were left out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] = set()
        self._digests: set[bytes] = set()
        self.groups: list[ImageGroup] = []
        self.num_omitted = 0
        self._num_images = 0

    def add_results(self, rows: Sequence[Row], columns: Sequence[Column]) -> None:
        """Add the images of all results: their files, or what the run made; parts of panels are only named."""
        for row in rows:
            files = {str(row[column.name]): column for column in columns if column.is_file and column.name in row}
            has_panel = any(column.name == "panel" for column in files.values())
            group = ImageGroup(Path(row["image"]).name, describe(row, columns))
            if not Path(row["image"]).is_absolute() and row["image"] not in files:
                if any(name.endswith(".png") for name in files):
                    group.files.append(row["image"])
                    self._names.add(row["image"])
                else:
                    self._add(group, row["image"], "result")
            for name, column in files.items():
                if not name.endswith(SUFFIXES) or (has_panel and column.is_part):
                    group.files.append(name)
                    self._names.add(name)
                else:
                    self._add(group, name, column.title)
            if group.images or self._num_images < MAX_IMAGES:
                self.groups.append(group)

    def add_rest(self, excluded: set[str]) -> None:
        """Add all other images in the run directory."""
        group = ImageGroup("" if not self.groups else "other images")
        excluded = excluded | ({PREVIEW} if self.groups else set())
        for folder in ("images", "plots"):
            for file in sorted((self._path / folder).glob("*")):
                name = str(file.relative_to(self._path))
                if file.is_file() and file.suffix in SUFFIXES and name not in excluded:
                    self._add(group, name, name)
        if group.images:
            self.groups.append(group)

    def _add(self, group: ImageGroup, name: str, title: str) -> None:
        """Add an image to a group, unless the page has it, also below another name."""
        if name in self._names or not name.endswith(SUFFIXES):
            return
        self._names.add(name)
        if self._num_images >= MAX_IMAGES:
            self.num_omitted += 1
            return
        content = read_file(self._path, name)
        digest = hashlib.sha256(content).digest()
        if content and digest not in self._digests:
            self._digests.add(digest)
            images = _embed(content, title, name.endswith(".gif"))
            group.images += images
            self._num_images += len(images)


def describe(row: Row, columns: Sequence[Column]) -> str:
    """Return the values of a result as text."""
    parts = [row["error"]] if "error" in row else []
    for column in columns:
        values = [tables.format_result(value) for value in column.values_of(row)]
        if values and not column.is_file:
            parts.append(f"{column.title}: {', '.join(values)} {column.unit}".rstrip())
    return "; ".join(parts)


def read_file(path: Path, name: str) -> bytes:
    """Return the bytes of a file in a run directory; none if it cannot be read, or lies outside of it."""
    file = path / name
    try:
        return file.read_bytes() if file.resolve().is_relative_to(path.resolve()) else b""
    except (OSError, ValueError):
        return b""


def _embed(content: bytes, title: str, is_gif: bool) -> list[EmbeddedImage]:
    """Return an image, reduced, as bytes in the page; nothing if it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if is_gif and len(content) <= MAX_GIF_BYTES:
                return [EmbeddedImage(title, to_uri("image/gif", content), width, height)]
            reduced = image.convert("RGB")
            reduced.thumbnail((MAX_PX, MAX_PX))
    except (OSError, ValueError):
        return []
    buffer = io.BytesIO()
    reduced.save(buffer, "WEBP", quality=QUALITY)
    return [EmbeddedImage(title, to_uri("image/webp", buffer.getvalue()), *reduced.size)]


def to_uri(kind: str, content: bytes) -> str:
    """Return bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_thumbnail(path: Path) -> None:
    """Write the thumbnail of a run: the first image of its results, else its headline curve; nothing without both."""
    summary = read_summary(path)
    content = _image_thumbnail(path, summary) or _curve_thumbnail(path, summary)
    if content:
        atomic.write(path / THUMBNAIL, lambda file: file.write(content))


def read_thumbnail(path: Path) -> str | None:
    """Return the thumbnail of a run as a data URI, None if it has none."""
    try:
        if (path / THUMBNAIL).stat().st_size > MAX_THUMBNAIL_BYTES:
            return None
    except OSError:
        return None
    content = read_file(path, THUMBNAIL)
    return to_uri("image/png", content) if content.startswith(PNG_SIGNATURE) else None


def _image_thumbnail(path: Path, summary: Mapping[str, Any]) -> bytes:
    from PIL import Image

    columns = read_columns(summary)
    for row in summary.get("results", []):
        files = [str(row[column.name]) for column in columns if column.is_file and column.name in row]
        for name in (row["image"], *files):
            content = b"" if Path(name).is_absolute() or not name.endswith(".png") else read_file(path, name)
            try:
                if content:
                    with Image.open(io.BytesIO(content)) as image:
                        reduced = image.convert("RGB")
                        reduced.thumbnail(THUMBNAIL_SIZE)
                    return _png(reduced)
            except (OSError, ValueError):
                continue
    return b""


def _curve_thumbnail(path: Path, summary: Mapping[str, Any]) -> bytes:
    """Draw the headline curve of a run on a transparent background."""
    from PIL import Image, ImageDraw

    lines = {
        name: curve for name, curve in curves.read(path).items() if name != "lr" and len(curve[0]) > 1 and any(curve[1])
    }
    ranked = metrics.headline({name: ys[-1] for name, (_, ys) in lines.items()}, summary.get("metric_info", {}))
    if not ranked:
        return b""
    xs, ys = lines[ranked[0]]
    width, height = THUMBNAIL_SIZE
    left, bottom = min(xs), min(ys)
    span_x, span_y = max(max(xs) - left, 1e-30), max(max(ys) - bottom, 1e-30)
    points = [
        (4 + (x - left) / span_x * (width - 9), height - 5 - (y - bottom) / span_y * (height - 9))
        for x, y in zip(xs, ys, strict=True)
    ]
    image = Image.new("RGBA", THUMBNAIL_SIZE, (0, 0, 0, 0))
    color = colors.LIGHT[colors.of_metrics(ranked)[ranked[0]].color]
    ImageDraw.Draw(image).line(points, fill=color, width=4, joint="curve")
    return _png(image)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
