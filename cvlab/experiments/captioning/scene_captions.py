"""scene_sentences, the built-in set with captions: 224 px pictures of one or two shapes, each with the one sentence.

"a red star" or "a red star left of a blue ring": of two things the left one comes first, or the upper one where they
stand more above than beside each other; where neither is plain a picture is left out. `<root>/scene_sentences-v2/`
holds images/*.png and captions.csv; the split is the first part of a file's name.
"""

import csv
import io
from collections.abc import Iterator

from cvlab.data.generated import GeneratedDataset
from cvlab.data.scenes import generator
from cvlab.data.scenes.generator import Rules, Scene, Thing

COUNTS = {"train": 8000, "val": 250, "test": 250}
SEEDS = {"train": 11, "val": 12, "test": 13}
RULES = Rules(without=0.0, most=2, least_across=64, most_across=112)
PLAIN = 1.5  # times as far apart in one direction as in the other
RELATIONS = ("left of", "above")


def sentence(scene: Scene) -> str | None:
    """Return the sentence about a scene; None where it has no plain one."""
    if len(scene.things) == 1:
        return f"a {_named(scene.things[0])}"
    if len(scene.things) != 2:
        return None
    first, second = scene.things
    across, down = (abs(a - b) for a, b in zip(_middle(first), _middle(second), strict=True))
    if max(across, down) < PLAIN * min(across, down):
        return None
    axis = 0 if across > down else 1
    first, second = sorted(scene.things, key=lambda thing: _middle(thing)[axis])
    return f"a {_named(first)} {RELATIONS[axis]} a {_named(second)}"


def parts(text: str) -> dict[str, tuple[str, ...]]:
    """Return what a sentence says, to be compared part by part: shapes, colours, relation."""
    found = [relation for relation in RELATIONS if f" {relation} " in text]
    words = text.replace(f" {found[0]} ", " ").split() if found else text.split()
    named = [word for word in words if word != "a"]
    return {"colours": tuple(named[::2]), "shapes": tuple(named[1::2]), "relations": tuple(found)}


def _named(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _middle(thing: Thing) -> tuple[float, float]:
    x1, y1, x2, y2 = thing.box_xyxy
    return (x1 + x2) / 2, (y1 + y2) / 2


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield every file of the set: its path in the folder, and its content."""
    rows = [("image", "caption")]
    for split, count in COUNTS.items():
        number = made = 0
        while made < count:
            scene = generator.draw(SEEDS[split], number, RULES)
            number += 1
            text = sentence(scene)
            if text is None:
                continue
            name = f"{split}_{made:04d}.png"
            made += 1
            yield f"images/{name}", scene.png()
            rows.append((name, text))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    yield "captions.csv", table.getvalue().encode()


SET = GeneratedDataset("scene_sentences", 2, sum(COUNTS.values()), lambda: _files())  # noqa: PLW0108 - defined below
