"""A painting that comes along: brush strokes in blues and yellows that follow a field of whirls, drawn by a formula."""

import colorsys
import functools
import math

import torch
from PIL import Image, ImageDraw

from cvlab.data import rng

Whirls = list[tuple[float, float, float, int]]  # place, radius, direction
SIZE_PX = (640, 512)
NUM_STROKES = 5200
NUM_WHIRLS = 9


@functools.lru_cache(maxsize=1)
def painting() -> Image.Image:
    """Draw it: 640 x 512 pixels, always the same."""
    width, height = SIZE_PX
    drawn = rng.uniform(0, 0, torch.arange(NUM_WHIRLS * 4), "whirls").view(-1, 4).tolist()
    whirls = [(x * width, y * height, 40 + 90 * r, 1 if turn < 0.6 else -1) for x, y, r, turn in drawn]
    sheet = Image.new("RGB", SIZE_PX, (24, 40, 96))
    draw = ImageDraw.Draw(sheet)
    strokes = rng.uniform(0, 1, torch.arange(NUM_STROKES * 6), "strokes").view(-1, 6).tolist()
    for k, (x, y, tint, shade, length, wide) in enumerate(strokes):
        fine = k / NUM_STROKES  # broad strokes first
        draw.line(
            _stroke(x * width, y * height, 14 + 22 * length * (1.4 - fine), whirls),
            fill=_colour(x * width, y * height, tint, shade, whirls),
            width=round(2 + (7 - 5 * fine) * (0.5 + wide / 2)),
            joint="curve",
        )
    return sheet


def _flow(x: float, y: float, whirls: Whirls) -> float:
    """Return the direction of the brush at a place, in radians: along the whirls near by, else gently across."""
    across, down = 1.0, 0.35 * math.sin(x / 60) + 0.2 * math.cos(y / 45)
    for cx, cy, radius, turn in whirls:
        dx, dy = x - cx, y - cy
        pull = 6 * math.exp(-(dx * dx + dy * dy) / (2 * radius * radius))
        distance = math.hypot(dx, dy) + 1e-6
        across -= turn * pull * dy / distance
        down += turn * pull * dx / distance
    return math.atan2(down, across)


def _stroke(x: float, y: float, length: float, whirls: Whirls) -> list[tuple[float, float]]:
    points = [(x, y)]
    for _ in range(6):
        angle = _flow(x, y, whirls)
        x, y = x + length / 6 * math.cos(angle), y + length / 6 * math.sin(angle)
        points.append((x, y))
    return points


def _colour(x: float, y: float, tint: float, shade: float, whirls: Whirls) -> tuple[int, int, int]:
    """Return the colour of a stroke: yellow in the middle of a whirl, rings of light blue around it."""
    glow = max(math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.18 * r * r)) for cx, cy, r, _ in whirls)
    ring = max(0.5 + 0.5 * math.cos(math.hypot(x - cx, y - cy) / r * 7) for cx, cy, r, _ in whirls)
    if tint < 0.06 + 0.9 * glow:
        hue, saturation, value = 0.13 + 0.03 * shade, 0.55 + 0.35 * shade, 0.85 + 0.15 * shade
    elif tint > 0.94:
        hue, saturation, value = 0.06, 0.6, 0.45 + 0.3 * shade
    else:
        hue, saturation, value = 0.56 + 0.08 * shade, 0.85 - 0.45 * ring * shade, 0.3 + 0.5 * ring * (0.4 + 0.6 * shade)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
