"""The images of a run inside a page: reduced, as data URIs, each once; and the thumbnail of a run."""

import base64
import contextlib
import hashlib
import io
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvlab.data.photo_paths import FORMATS, MAX_FILE_BYTES, MAX_PIXELS
from cvlab.reports import colors, curves, metrics, tables
from cvlab.runs.records import Row, read_summary
from cvlab.runs.results import Column, read_columns
from cvlab.storage import atomic, regular_files

MAX_IMAGES, MAX_PX = 48, 1400  # of a page; the files in the run directory have their full size
MAX_GIF_BYTES = 2_000_000
MAX_PAGE_PIXELS = 250_000_000  # of all images of a page together: decoding them takes about 5 s
GIF_SIGNATURES = (b"GIF87a", b"GIF89a")
WEBP = {"quality": 85, "method": 2}  # half of the time of the default method 4, for 2 % more bytes
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
    """Collects the images of a run, those of one result together.

    Args:
        path: The run directory.
        max_images: Maximum number of images; None: MAX_IMAGES.
        max_px: Longest side to which they are reduced.

    Attributes:
        groups: The groups.
        num_omitted: Number of images that were left out.
    """

    def __init__(self, path: Path, max_images: int | None = None, max_px: int = MAX_PX) -> None:
        self._path, self._max_px = path, max_px
        self._max_images = MAX_IMAGES if max_images is None else max_images
        self._names: set[str] = set()
        self._digests: set[bytes] = set()
        self.groups: list[ImageGroup] = []
        self.num_omitted = 0
        self._num_images = 0
        self._pixels_left = MAX_PAGE_PIXELS

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
            if group.images or self._num_images < self._max_images:
                self.groups.append(group)

    def add_rest(self, excluded: set[str]) -> None:
        """Add all other images in the run directory."""
        group = ImageGroup("" if not self.groups else "other images")
        excluded = excluded | ({PREVIEW} if self.groups else set())
        for folder in ("images", "plots"):
            if (self._path / folder).is_symlink():
                continue
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
        if self._num_images >= self._max_images:
            self.num_omitted += 1
            return
        content = read_file(self._path, name)
        digest = hashlib.sha256(content).digest()
        if not content or digest in self._digests:
            return
        self._digests.add(digest)
        count = num_pixels(content)
        if count > min(MAX_PIXELS, self._pixels_left):
            self.num_omitted += 1
            return
        self._pixels_left -= count
        images = embed(content, title, self._max_px)
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
    try:
        return regular_files.read_below(path, name, MAX_FILE_BYTES)
    except (OSError, ValueError):
        return b""


def num_pixels(content: bytes) -> int:
    """Return the number of pixels that an image's header gives, 0 if it is no image that is shown."""
    if content.startswith(GIF_SIGNATURES):  # its decoder is not among those of photos
        width, height = struct.unpack("<HH", content[6:10].ljust(4, b"\0"))
        return int(width * height)
    with _opened(content) as image:
        return image.width * image.height if image is not None else 0


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Any]:
    """Open an image by the decoders of photos, without decoding it; None if that is not possible."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about sizes, which are checked
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Exception:  # decoders raise many types of errors for damaged files
            yield None
            return
        with image:
            yield image


def reduce(content: bytes, size: tuple[int, int]) -> Any:
    """Return an image in RGB, reduced to fit into `size`; None if it cannot be decoded or has too many pixels."""
    with _opened(content) as image:
        if image is None or image.width * image.height > MAX_PIXELS:
            return None
        try:
            reduced = image.convert("RGB")
            reduced.thumbnail(size)
        except Exception:  # decoders raise many types of errors for damaged files
            return None
        return reduced


def embed(content: bytes, title: str, max_px: int = MAX_PX) -> list[EmbeddedImage]:
    """Return an image, reduced, as bytes in the page; nothing if it cannot be decoded."""
    if content.startswith(GIF_SIGNATURES):
        width, height = struct.unpack("<HH", content[6:10].ljust(4, b"\0"))
        is_shown = len(content) <= MAX_GIF_BYTES and 0 < width * height <= MAX_PIXELS
        return [EmbeddedImage(title, to_uri("image/gif", content), width, height)] if is_shown else []
    reduced = reduce(content, (max_px, max_px))
    if reduced is None:
        return []
    buffer = io.BytesIO()
    reduced.save(buffer, "WEBP", **WEBP)
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
        content = regular_files.read_bytes(path / THUMBNAIL, MAX_THUMBNAIL_BYTES)
    except OSError:
        return None
    if not content.startswith(PNG_SIGNATURE) or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])
    is_small = width <= THUMBNAIL_SIZE[0] and height <= THUMBNAIL_SIZE[1]
    return to_uri("image/png", content) if is_small else None


def _image_thumbnail(path: Path, summary: Mapping[str, Any]) -> bytes:
    columns = read_columns(summary)
    for row in summary.get("results", []):
        files = [str(row[column.name]) for column in columns if column.is_file and column.name in row]
        for name in (row["image"], *files):
            content = b"" if Path(name).is_absolute() or not name.endswith(".png") else read_file(path, name)
            reduced = reduce(content, THUMBNAIL_SIZE) if content else None
            if reduced is not None:
                return _png(reduced)
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
