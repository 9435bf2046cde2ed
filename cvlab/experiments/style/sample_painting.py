"""A procedurally generated painting, bundled as a sample style image: blue and yellow brush strokes around swirls."""

import colorsys
import functools
import math

import torch
from PIL import Image, ImageDraw

from cvlab.data import rng

Swirls = list[tuple[float, float, float, int]]  # x, y, radius, direction of rotation (1 or -1)
SIZE_PX = (640, 512)
NUM_STROKES = 5200
NUM_SWIRLS = 9


@functools.lru_cache(maxsize=1)
def sample_painting() -> Image.Image:
    """Draw the painting: 640 x 512 pixels, always the same."""
    width, height = SIZE_PX
    numbers = rng.uniform(0, 0, torch.arange(NUM_SWIRLS * 4), "whirls").view(-1, 4).tolist()
    swirls = [(x * width, y * height, 40 + 90 * r, 1 if side < 0.6 else -1) for x, y, r, side in numbers]
    canvas = Image.new("RGB", SIZE_PX, (24, 40, 96))
    draw = ImageDraw.Draw(canvas)
    strokes = rng.uniform(0, 1, torch.arange(NUM_STROKES * 6), "strokes").view(-1, 6).tolist()
    for k, (x, y, tint, shade, length, breadth) in enumerate(strokes):
        fineness = k / NUM_STROKES  # broad strokes first
        draw.line(
            _stroke_points(x * width, y * height, 14 + 22 * length * (1.4 - fineness), swirls),
            fill=_stroke_color(x * width, y * height, tint, shade, swirls),
            width=round(2 + (7 - 5 * fineness) * (0.5 + breadth / 2)),
            joint="curve",
        )
    return canvas


def _flow_angle(x: float, y: float, swirls: Swirls) -> float:
    """Return the direction of a stroke in radians: around nearby swirls, else roughly horizontal."""
    dx, dy = 1.0, 0.35 * math.sin(x / 60) + 0.2 * math.cos(y / 45)
    for center_x, center_y, radius, direction in swirls:
        offset_x, offset_y = x - center_x, y - center_y
        strength = 6 * math.exp(-(offset_x * offset_x + offset_y * offset_y) / (2 * radius * radius))
        distance = math.hypot(offset_x, offset_y) + 1e-6
        dx -= direction * strength * offset_y / distance
        dy += direction * strength * offset_x / distance
    return math.atan2(dy, dx)


def _stroke_points(x: float, y: float, length: float, swirls: Swirls) -> list[tuple[float, float]]:
    points = [(x, y)]
    for _ in range(6):
        angle = _flow_angle(x, y, swirls)
        x, y = x + length / 6 * math.cos(angle), y + length / 6 * math.sin(angle)
        points.append((x, y))
    return points


def _stroke_color(x: float, y: float, tint: float, shade: float, swirls: Swirls) -> tuple[int, int, int]:
    """Return the color of a stroke: yellow at the center of a swirl, light blue rings around it."""
    glow = max(math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.18 * r * r)) for cx, cy, r, _ in swirls)
    ring = max(0.5 + 0.5 * math.cos(math.hypot(x - cx, y - cy) / r * 7) for cx, cy, r, _ in swirls)
    if tint < 0.06 + 0.9 * glow:
        hue, saturation, value = 0.13 + 0.03 * shade, 0.55 + 0.35 * shade, 0.85 + 0.15 * shade
    elif tint > 0.94:
        hue, saturation, value = 0.06, 0.6, 0.45 + 0.3 * shade
    else:
        hue, saturation, value = 0.56 + 0.08 * shade, 0.85 - 0.45 * ring * shade, 0.3 + 0.5 * ring * (0.4 + 0.6 * shade)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
