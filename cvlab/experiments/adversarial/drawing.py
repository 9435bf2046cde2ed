"""The panel of an attack: the photo before and after it, and their difference."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from cvlab.reports import images

MAX_SCALE, SHOWN_CHANGE = 50, 100  # the largest change is amplified to about 100/255, since it is invisible otherwise


def attack_panel(
    name: str, values: Mapping[str, Any], before: Image.Image, after: Image.Image, region: tuple[int, int, int, int]
) -> Image.Image:
    """Draw an attack: both images with their predictions, and the amplified difference.

    Args:
        name: The photo's file name.
        values: The values of the result.
        before: The image before the attack.
        after: The attacked image as it was saved.
        region: The part of it that the model sees and the attack changes: left, top, right, bottom.
    """
    steps = f"{values['steps']} step{'' if values['steps'] == 1 else 's'}"
    change = f"L2 {values['l2']:.2f}, at most {values['linf_255']:.0f}/255, after {steps}"
    if "survives" in values:
        change += f"; survives {values['survives']}"
    is_part = tuple(region) != (0, 0, *before.size)
    where = "; only the center crop that the model sees is changed (outlined)" if is_part else ""
    scale = int(max(1, min(MAX_SCALE, SHOWN_CHANGE / max(values["linf_255"], 1))))
    difference = images.difference(before, after, scale)
    tiles = [
        (f"before: {_prediction(values['before'])}", before),
        (f"after: {_prediction(values)}", after),
        (f"difference x {scale}, around gray", images.outline(difference, region)),
    ]
    target = f" to {values['target']}" if values.get("target") else ""
    return images.panel(tiles, f"attack{target}: {name}\n{change}{where}")


def _prediction(values: Mapping[str, Any]) -> str:
    return f"{values['label']} {values['score']:.2f}"
