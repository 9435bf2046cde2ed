"""scene_captions, the built-in captioned data set: generated 224 px images of one or two objects, one caption each.

"a red star" or "a red star left of a blue ring". Of two objects the left one comes first; the upper one, if they are
further apart vertically than horizontally. Scenes where neither relation is clear are skipped.
`<root>/scene_captions-v2/` holds images/*.png and captions.csv; a file's name begins with its split.
"""

import csv
import io
from collections.abc import Iterator

from cvlab.data.generated import GeneratedDataset
from cvlab.data.scenes import generator
from cvlab.data.scenes.generator import Scene, SceneConfig, SceneObject
from cvlab.experiments.captioning.config import SCENE_CAPTIONS

COUNTS = {"train": 8000, "val": 250, "test": 250}
SEEDS = {"train": 11, "val": 12, "test": 13}
SCENE_CONFIG = SceneConfig(empty_probability=0.0, max_objects=2, min_size_px=64, max_size_px=112)
MIN_AXIS_RATIO = 1.5  # the distance along one axis is at least this times the other, else the relation is unclear
RELATIONS = ("left of", "above")


def describe(scene: Scene) -> str | None:
    """Return the caption of a scene; None if it has no object, more than two, or an unclear relation."""
    if len(scene.objects) == 1:
        return f"a {_noun_phrase(scene.objects[0])}"
    if len(scene.objects) != 2:
        return None
    first, second = scene.objects
    dx, dy = (abs(a - b) for a, b in zip(_box_center(first), _box_center(second), strict=True))
    if max(dx, dy) < MIN_AXIS_RATIO * min(dx, dy):
        return None
    axis = 0 if dx > dy else 1
    first, second = sorted(scene.objects, key=lambda scene_object: _box_center(scene_object)[axis])
    return f"a {_noun_phrase(first)} {RELATIONS[axis]} a {_noun_phrase(second)}"


def parse_caption(caption: str) -> dict[str, tuple[str, ...]]:
    """Split a caption into its shapes, colors and relations, which are scored separately."""
    relations = [relation for relation in RELATIONS if f" {relation} " in caption]
    tokens = caption.replace(f" {relations[0]} ", " ").split() if relations else caption.split()
    tokens = [word for word in tokens if word != "a"]
    return {"color": tuple(tokens[::2]), "shape": tuple(tokens[1::2]), "relation": tuple(relations)}


def _noun_phrase(scene_object: SceneObject) -> str:
    return f"{scene_object.color} {scene_object.shape}"


def _box_center(scene_object: SceneObject) -> tuple[float, float]:
    x1, y1, x2, y2 = scene_object.box_xyxy
    return (x1 + x2) / 2, (y1 + y2) / 2


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield the path inside the folder and the content of every file of the data set."""
    rows = [("image", "caption")]
    for split, count in COUNTS.items():
        number = num_captioned = 0
        while num_captioned < count:
            scene = generator.generate_scene(SEEDS[split], number, SCENE_CONFIG)
            number += 1
            caption = describe(scene)
            if caption is None:
                continue
            name = f"{split}_{num_captioned:04d}.png"
            num_captioned += 1
            yield f"images/{name}", scene.png()
            rows.append((name, caption))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    yield "captions.csv", table.getvalue().encode()


GENERATED = GeneratedDataset(SCENE_CAPTIONS, 2, sum(COUNTS.values()), _files)
