"""One scene drawn from (seed, number): one to five shapes on a textured ground with spots that distract, or none.

Every shape is whole inside the picture, of a colour that differs from what it lies on; later ones lie over earlier
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
from cvlab.data.scenes.render import COLORS, SHAPES, cover, grid, paint, stripes

SIZE_PX = 224
MEDIUM_FROM, LARGE_FROM = 48, 76  # px across, for the words
TRIES = 25
MOST_IOU = 0.18  # of two boxes; under 0.2 also after rounding to pixels
MOST_HIDDEN = 0.35  # of a box, by the boxes that lie over it
CONTRAST = 0.75  # sum over the channels between a colour and what it lies on
NUMBERS = 500  # random ones that a picture can use
Option = TypeVar("Option")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Rules:
    """How many things a scene has and how large they are: px of the longer side of a box."""

    without: float = 0.05
    most: int = 5
    least_across: float = 26
    most_across: float = 108


@dataclass(frozen=True)
class Thing:
    """One shape of a scene. `box_xyxy` is tight around it, in pixels; place, radius and tilt as `cover` takes them."""

    shape: str
    color: str
    box_xyxy: Box
    centre: tuple[float, float]
    radius: float
    angle: float

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Shape, colour, size and position, as a sentence would name them."""
        x1, y1, x2, y2 = self.box_xyxy
        across = max(x2 - x1, y2 - y1)
        size = "large" if across >= LARGE_FROM else "medium" if across >= MEDIUM_FROM else "small"
        column = ("left", "centre", "right")[int((x1 + x2) / 2 * 3 / SIZE_PX)]
        row = ("top", "middle", "bottom")[int((y1 + y2) / 2 * 3 / SIZE_PX)]
        position = "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
        return self.shape, self.color, size, position


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 (224, 224, 3), and its things in the order in which they were laid down."""

    picture: Tensor
    things: tuple[Thing, ...]

    def png(self) -> bytes:
        """Encode the picture."""
        buffer = io.BytesIO()
        Image.fromarray(self.picture.numpy()).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread: for layers this small several cost more, 50 times on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def draw(seed: int, number: int, rules: Rules = Rules()) -> Scene:
    """Draw one scene."""
    numbers = iter(rng.uniform(seed, number, torch.arange(NUMBERS), "scenes").tolist())
    ground = tuple(0.3 * a + 0.7 * (0.1 + 0.8 * next(numbers)) for a in _pick(list(COLORS.values()), numbers))
    things = _arrange(ground, numbers, rules)
    canvas = _background(ground, numbers, int(rng.hashes(seed, number, torch.arange(1), "scenes").item()))
    for _ in range(int(_between(3, 14, numbers))):
        canvas = _lay_spot(canvas, numbers)
    for thing in things:
        canvas = _lay(canvas, thing, numbers)
    picture = (canvas[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Scene(picture, tuple(things))


def _between(low: float, high: float, numbers: Iterator[float]) -> float:
    return low + (high - low) * next(numbers)


def _pick(options: Sequence[Option], numbers: Iterator[float]) -> Option:
    return options[int(next(numbers) * len(options))]


def _differ(a: Sequence[float], b: Sequence[float]) -> bool:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) >= CONTRAST


def _arrange(ground: Sequence[float], numbers: Iterator[float], rules: Rules) -> list[Thing]:
    """Choose what is in a scene and where: whole, apart enough, and of colours that differ from what they lie on."""
    things: list[Thing] = []
    wanted = 0 if next(numbers) < rules.without else 1 + int(next(numbers) * rules.most)
    for _ in range(TRIES):
        if len(things) == wanted:
            break
        shape = _pick(list(SHAPES), numbers)
        angle = _between(-0.35, 0.35, numbers)
        left, top, right, bottom = _reach(shape, angle)
        across = rules.least_across + (rules.most_across - rules.least_across) * next(numbers) ** 1.3
        radius = across / max(right - left, bottom - top)
        x = _between(2 - radius * left, SIZE_PX - 2 - radius * right, numbers)
        y = _between(2 - radius * top, SIZE_PX - 2 - radius * bottom, numbers)
        box = (x + radius * left, y + radius * top, x + radius * right, y + radius * bottom)
        beside = [thing.color for thing in things if _shared(box, thing.box_xyxy) > 0]
        below = [ground, *(COLORS[name] for name in beside)]
        colors = [name for name, color in COLORS.items() if all(_differ(color, other) for other in below)]
        color = next(numbers)
        if colors and _has_room(box, things):
            scale = 2 / SIZE_PX
            place = (x * scale - 1, y * scale - 1)
            tight = _tight(shape, place, radius * scale, angle)
            things.append(Thing(shape, colors[int(color * len(colors))], tight, place, radius * scale, angle))
    return things


@functools.cache
def _outline(shape: str) -> Tensor:
    """Return the outermost points of a shape in every row, (N, 2), in its own coordinates."""
    x, y = (1.25 * axis[0] for axis in grid(320))
    rows = []
    for inside, xs, ys in zip(SHAPES[shape](x, y) < 0, x, y, strict=True):
        if inside.any():
            rows += [torch.stack([end, ys[0]]) for end in (xs[inside].amin(), xs[inside].amax())]
    return torch.stack(rows)


def _reach(shape: str, angle: float) -> Box:
    """Return how far a turned shape of radius 1 reaches from its centre: left, top, right, bottom."""
    u, v = _outline(shape).unbind(1)
    x, y = math.cos(angle) * u - math.sin(angle) * v, math.sin(angle) * u + math.cos(angle) * v
    return x.min().item(), y.min().item(), x.max().item(), y.max().item()


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _has_room(box: Box, things: Sequence[Thing]) -> bool:
    """Whether a box may be laid over the others: little overlap, and none of them hidden by the later ones."""
    for k, thing in enumerate(things):
        shared = _shared(box, thing.box_xyxy)
        over = sum(_shared(later.box_xyxy, thing.box_xyxy) for later in things[k + 1 :])
        if shared + over > MOST_HIDDEN * _area(thing.box_xyxy):
            return False
        if shared > MOST_IOU * (_area(box) + _area(thing.box_xyxy) - shared):
            return False
    return True


@functools.cache
def _grid() -> tuple[Tensor, Tensor]:
    x, y = grid(SIZE_PX)
    return x.contiguous(), y.contiguous()


def _coverage(shape: str, centre: tuple[float, float], radius: float, angle: float) -> tuple[Tensor, tuple[slice, ...]]:
    """Return how much of each pixel a shape covers, (1, h, w), and the window of the picture around it."""
    x, y = _grid()
    middle, half = [(c + 1) * SIZE_PX / 2 for c in centre], 1.25 * radius * SIZE_PX / 2 + 2
    columns, rows = (slice(max(0, int(m - half)), min(SIZE_PX, int(m + half) + 1)) for m in middle)
    at = torch.tensor([centre]), torch.tensor([radius]), torch.tensor([angle])
    return cover(shape, x[:, rows, columns], y[:, rows, columns], *at, SIZE_PX), (rows, columns)


def _tight(shape: str, centre: tuple[float, float], radius: float, angle: float) -> Box:
    """Return the box of the pixels that a shape covers by more than half."""
    coverage, (rows, columns) = _coverage(shape, centre, radius, angle)
    covered = coverage[0] > 0.5
    down, across = covered.any(1).nonzero(), covered.any(0).nonzero()
    left, top = columns.start, rows.start
    return (
        float(left + across.min().item()),
        float(top + down.min().item()),
        float(left + across.max().item() + 1),
        float(top + down.max().item() + 1),
    )


def _one(*values: float) -> Tensor:
    return torch.tensor([values]) if len(values) > 1 else torch.tensor(values)


def _background(ground: Sequence[float], numbers: Iterator[float], seed: int) -> Tensor:
    """Return a canvas (1, 3, 224, 224): a colour with blotches, a slope of light, and stripes or checks."""
    x, y = _grid()
    cells = int(_between(3, 24, numbers))
    noise = torch.rand(1, 3, cells, cells, generator=torch.Generator().manual_seed(seed)) - 0.5
    blotches = F.interpolate(noise, size=(SIZE_PX, SIZE_PX), mode="bilinear", align_corners=False)
    turn = _between(0, 6.28, numbers)
    slope = (math.cos(turn) * x + math.sin(turn) * y).unsqueeze(1)
    color = torch.tensor(ground).view(1, 3, 1, 1)
    canvas = color + _between(0.1, 0.45, numbers) * blotches + _between(0, 0.12, numbers) * slope
    wave = _wave(x, y, _between(4, 24, numbers), numbers)
    shade = 1 - _between(-0.2, 0.4, numbers) * wave.unsqueeze(1)
    return (canvas * shade).clamp(0, 1)


def _wave(x: Tensor, y: Tensor, cycles: float, numbers: Iterator[float]) -> Tensor:
    """Return a texture in [0, 1], (1, h, w): stripes, or checks in a third of the cases."""
    angle, phase, kind = _between(0, 3.14, numbers), _between(0, 6.28, numbers), next(numbers)
    wave = stripes(x, y, _one(angle), _one(cycles), _one(phase))
    return wave * stripes(x, y, _one(angle + 1.571), _one(cycles), _one(phase)) if kind < 1 / 3 else wave


def _lay_spot(canvas: Tensor, numbers: Iterator[float]) -> Tensor:
    """Lay a small round spot of any colour over a canvas: too small to be one of the shapes."""
    centre = (_between(-1, 1, numbers), _between(-1, 1, numbers))
    coverage, (rows, columns) = _coverage("circle", centre, _between(4, 16, numbers) / SIZE_PX, 0.0)
    color = _one(next(numbers), next(numbers), next(numbers))
    part = canvas[:, :, rows, columns]
    strength = _between(0.4, 0.9, numbers)
    canvas[:, :, rows, columns] = paint(part, strength * coverage, color, torch.zeros_like(coverage), _one(0.0))
    return canvas


def _lay(canvas: Tensor, thing: Thing, numbers: Iterator[float]) -> Tensor:
    """Lay a thing over a canvas, its colour and texture a little at random."""
    coverage, (rows, columns) = _coverage(thing.shape, thing.centre, thing.radius, thing.angle)
    x, y = _grid()
    color = _one(*(min(1.0, max(0.0, value + _between(-0.07, 0.07, numbers))) for value in COLORS[thing.color]))
    wave = _wave(x[:, rows, columns], y[:, rows, columns], _between(8, 40, numbers), numbers)
    contrast = _one(max(0.0, _between(-0.15, 0.45, numbers)))
    canvas[:, :, rows, columns] = paint(canvas[:, :, rows, columns], coverage, color, wave, contrast)
    return canvas
