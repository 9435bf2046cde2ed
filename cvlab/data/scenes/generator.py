"""Generate one scene from (seed, number): up to five objects on a textured background with small distracting spots.

Every object lies entirely inside the image and contrasts with what it lies on; later objects are drawn over earlier
ones.
"""

import contextlib
import functools
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.data import rng
from cvlab.data.scenes.render import COLORS, SHAPES, blend, pixel_grid, shape_coverage, stripes

SIZE_PX = 224
MEDIUM_FROM_PX, LARGE_FROM_PX = 48, 76  # longer side of the box, for the attribute `size`
MAX_TRIES = 25  # to place an object
MAX_IOU = 0.18  # of two boxes; below 0.2 also after rounding to pixels
MAX_OCCLUSION = 0.35  # share of a box that is covered by the boxes drawn over it
MIN_CONTRAST = 0.75  # L1 distance between the color of an object and what it lies on
NUM_UNIFORMS = 500  # random numbers available to a scene
Option = TypeVar("Option")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneConfig:
    """How many objects a scene has, and how large they are (longer side of the box, before rounding)."""

    empty_probability: float = 0.05
    max_objects: int = 5
    min_size_px: float = 26
    max_size_px: float = 108


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        shape: A key of `render.SHAPES`.
        color: A key of `render.COLORS`.
        box_xyxy: The tight box around it, in pixels.
        center: x and y in the coordinates of `render.pixel_grid`, [-1, 1].
        radius: In the same coordinates.
        angle: Rotation in radians.
    """

    shape: str
    color: str
    box_xyxy: Box
    center: tuple[float, float]
    radius: float
    angle: float

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """Return shape, color, size and position in words."""
        x1, y1, x2, y2 = self.box_xyxy
        longer_side = max(x2 - x1, y2 - y1)
        size = "large" if longer_side >= LARGE_FROM_PX else "medium" if longer_side >= MEDIUM_FROM_PX else "small"
        column = ("left", "centre", "right")[int((x1 + x2) / 2 * 3 / SIZE_PX)]
        row = ("top", "middle", "bottom")[int((y1 + y2) / 2 * 3 / SIZE_PX)]
        position = "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
        return self.shape, self.color, size, position


@dataclass(frozen=True)
class Scene:
    """An image, uint8 (224, 224, 3), and its objects in drawing order."""

    image: Tensor
    objects: tuple[SceneObject, ...]

    def png(self) -> bytes:
        """Encode the image as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(self.image.numpy()).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    """Run torch on one thread: for tensors this small more threads are slower, up to 50 times on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@_single_thread()
def generate_scene(seed: int, number: int, config: SceneConfig = SceneConfig()) -> Scene:
    """Generate one scene.

    Args:
        seed: The seed of the data set or split.
        number: The index of the scene.
        config: Number and size of the objects.
    """
    uniforms = iter(rng.uniform(seed, number, torch.arange(NUM_UNIFORMS), "scenes").tolist())
    base_color = tuple(0.3 * a + 0.7 * (0.1 + 0.8 * next(uniforms)) for a in _choice(list(COLORS.values()), uniforms))
    objects = _place_objects(base_color, uniforms, config)
    noise_seed = int(rng.hashes(seed, number, torch.arange(1), "scenes").item())
    canvas = _background(base_color, uniforms, noise_seed)
    for _ in range(int(_uniform(3, 14, uniforms))):
        canvas = _draw_spot(canvas, uniforms)
    for scene_object in objects:
        canvas = _draw_object(canvas, scene_object, uniforms)
    image = (canvas[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Scene(image, tuple(objects))


def _uniform(low: float, high: float, uniforms: Iterator[float]) -> float:
    return low + (high - low) * next(uniforms)


def _choice(options: Sequence[Option], uniforms: Iterator[float]) -> Option:
    return options[int(next(uniforms) * len(options))]


def _has_contrast(a: Sequence[float], b: Sequence[float]) -> bool:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) >= MIN_CONTRAST


def _place_objects(base_color: Sequence[float], uniforms: Iterator[float], config: SceneConfig) -> list[SceneObject]:
    """Sample objects by rejection: inside the image, little overlap, and in contrast to what they lie on."""
    objects: list[SceneObject] = []
    num_objects = 0 if next(uniforms) < config.empty_probability else 1 + int(next(uniforms) * config.max_objects)
    for _ in range(MAX_TRIES):
        if len(objects) == num_objects:
            break
        shape = _choice(list(SHAPES), uniforms)
        angle = _uniform(-0.35, 0.35, uniforms)
        left, top, right, bottom = _extent(shape, angle)
        size_px = config.min_size_px + (config.max_size_px - config.min_size_px) * next(uniforms) ** 1.3
        radius = size_px / max(right - left, bottom - top)
        x = _uniform(2 - radius * left, SIZE_PX - 2 - radius * right, uniforms)
        y = _uniform(2 - radius * top, SIZE_PX - 2 - radius * bottom, uniforms)
        box = (x + radius * left, y + radius * top, x + radius * right, y + radius * bottom)
        overlapped = [other.color for other in objects if _intersection(box, other.box_xyxy) > 0]
        below = [base_color, *(COLORS[name] for name in overlapped)]
        colors = [name for name, color in COLORS.items() if all(_has_contrast(color, other) for other in below)]
        color_position = next(uniforms)
        if colors and _has_room(box, objects):
            scale = 2 / SIZE_PX
            center = (x * scale - 1, y * scale - 1)
            tight_box = _tight_box(shape, center, radius * scale, angle)
            color = colors[int(color_position * len(colors))]
            objects.append(SceneObject(shape, color, tight_box, center, radius * scale, angle))
    return objects


@functools.cache
def _outline(shape: str) -> Tensor:
    """Return the leftmost and rightmost point of a shape in every row, (N, 2), in the shape's own coordinates."""
    x, y = (1.25 * axis[0] for axis in pixel_grid(320))
    points = []
    for inside, xs, ys in zip(SHAPES[shape](x, y) < 0, x, y, strict=True):
        if inside.any():
            points += [torch.stack([end, ys[0]]) for end in (xs[inside].amin(), xs[inside].amax())]
    return torch.stack(points)


def _extent(shape: str, angle: float) -> Box:
    """Return the box of a rotated shape of radius 1 around its center: left, top, right, bottom."""
    u, v = _outline(shape).unbind(1)
    x, y = math.cos(angle) * u - math.sin(angle) * v, math.sin(angle) * u + math.cos(angle) * v
    return x.min().item(), y.min().item(), x.max().item(), y.max().item()


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _intersection(a: Box, b: Box) -> float:
    """Return the area of the intersection of two boxes."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _has_room(box: Box, objects: Sequence[SceneObject]) -> bool:
    """Whether a box may be drawn over the objects: their IoU is small, and none of them is occluded too much."""
    for k, scene_object in enumerate(objects):
        overlap = _intersection(box, scene_object.box_xyxy)
        occluded = sum(_intersection(later.box_xyxy, scene_object.box_xyxy) for later in objects[k + 1 :])
        if overlap + occluded > MAX_OCCLUSION * _area(scene_object.box_xyxy):
            return False
        if overlap > MAX_IOU * (_area(box) + _area(scene_object.box_xyxy) - overlap):
            return False
    return True


@functools.cache
def _grid() -> tuple[Tensor, Tensor]:
    x, y = pixel_grid(SIZE_PX)
    return x.contiguous(), y.contiguous()


def _coverage(shape: str, center: tuple[float, float], radius: float, angle: float) -> tuple[Tensor, tuple[slice, ...]]:
    """Return the coverage (1, h, w) of the pixels around a shape, and their rows and columns in the image."""
    x, y = _grid()
    center_px, half_px = [(c + 1) * SIZE_PX / 2 for c in center], 1.25 * radius * SIZE_PX / 2 + 2
    columns, rows = (slice(max(0, int(c - half_px)), min(SIZE_PX, int(c + half_px) + 1)) for c in center_px)
    pose = torch.tensor([center]), torch.tensor([radius]), torch.tensor([angle])
    return shape_coverage(shape, x[:, rows, columns], y[:, rows, columns], *pose, SIZE_PX), (rows, columns)


def _tight_box(shape: str, center: tuple[float, float], radius: float, angle: float) -> Box:
    """Return the box of the pixels that a shape covers by more than half."""
    coverage, (rows, columns) = _coverage(shape, center, radius, angle)
    is_covered = coverage[0] > 0.5
    ys, xs = is_covered.any(1).nonzero(), is_covered.any(0).nonzero()
    left, top = columns.start, rows.start
    return (
        float(left + xs.min().item()),
        float(top + ys.min().item()),
        float(left + xs.max().item() + 1),
        float(top + ys.max().item() + 1),
    )


def _batch_of_one(*values: float) -> Tensor:
    """Return a value as (1,), several as (1, N)."""
    return torch.tensor([values]) if len(values) > 1 else torch.tensor(values)


def _background(base_color: Sequence[float], uniforms: Iterator[float], noise_seed: int) -> Tensor:
    """Return a canvas (1, 3, 224, 224): a color with smooth noise, a gradient, and stripes or checks."""
    x, y = _grid()
    resolution = int(_uniform(3, 24, uniforms))
    noise = torch.rand(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(noise_seed)) - 0.5
    noise = F.interpolate(noise, size=(SIZE_PX, SIZE_PX), mode="bilinear", align_corners=False)
    direction = _uniform(0, 6.28, uniforms)
    gradient = (math.cos(direction) * x + math.sin(direction) * y).unsqueeze(1)
    color = torch.tensor(base_color).view(1, 3, 1, 1)
    canvas = color + _uniform(0.1, 0.45, uniforms) * noise + _uniform(0, 0.12, uniforms) * gradient
    texture = _texture(x, y, _uniform(4, 24, uniforms), uniforms)
    shade = 1 - _uniform(-0.2, 0.4, uniforms) * texture.unsqueeze(1)
    return (canvas * shade).clamp(0, 1)


def _texture(x: Tensor, y: Tensor, cycles: float, uniforms: Iterator[float]) -> Tensor:
    """Return a texture in [0, 1], (1, h, w): stripes, or checks in a third of the cases."""
    angle, phase, kind = _uniform(0, 3.14, uniforms), _uniform(0, 6.28, uniforms), next(uniforms)
    texture = stripes(x, y, _batch_of_one(angle), _batch_of_one(cycles), _batch_of_one(phase))
    if kind >= 1 / 3:
        return texture
    return texture * stripes(x, y, _batch_of_one(angle + 1.571), _batch_of_one(cycles), _batch_of_one(phase))


def _draw_spot(canvas: Tensor, uniforms: Iterator[float]) -> Tensor:
    """Draw a round spot of a random color over a canvas: a distractor, too small to be one of the objects."""
    center = (_uniform(-1, 1, uniforms), _uniform(-1, 1, uniforms))
    coverage, (rows, columns) = _coverage("circle", center, _uniform(4, 16, uniforms) / SIZE_PX, 0.0)
    color = _batch_of_one(next(uniforms), next(uniforms), next(uniforms))
    window = canvas[:, :, rows, columns]
    opacity = _uniform(0.4, 0.9, uniforms)
    no_texture = torch.zeros_like(coverage)
    canvas[:, :, rows, columns] = blend(window, opacity * coverage, color, no_texture, _batch_of_one(0.0))
    return canvas


def _draw_object(canvas: Tensor, scene_object: SceneObject, uniforms: Iterator[float]) -> Tensor:
    """Draw an object over a canvas, with a random texture and a slightly random color."""
    pose = (scene_object.center, scene_object.radius, scene_object.angle)
    coverage, (rows, columns) = _coverage(scene_object.shape, *pose)
    x, y = _grid()
    jittered = (min(1.0, max(0.0, c + _uniform(-0.07, 0.07, uniforms))) for c in COLORS[scene_object.color])
    color = _batch_of_one(*jittered)
    texture = _texture(x[:, rows, columns], y[:, rows, columns], _uniform(8, 40, uniforms), uniforms)
    contrast = _batch_of_one(max(0.0, _uniform(-0.15, 0.45, uniforms)))
    canvas[:, :, rows, columns] = blend(canvas[:, :, rows, columns], coverage, color, texture, contrast)
    return canvas
