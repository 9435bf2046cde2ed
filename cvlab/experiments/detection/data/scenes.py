"""scenes, the built-in set with boxes: 224 px pictures of shapes in VOC's layout, generated once, kept, checksummed.

`<root>/scenes-v1/` holds JPEGImages/*.png, Annotations/*.xml, ImageSets/Main/*.txt, scenes.json (for every picture its
shapes in words: shape, colour, size, position) and sha256.json. scenery.py draws them.
"""

import json
from collections.abc import Iterator

import torch

from cvlab.data.generated import GeneratedDataset
from cvlab.data.scenes import generator
from cvlab.experiments.detection.data import writers

COUNTS = {"train": 480, "val": 120, "test": 200}
SEEDS = {"train": 1, "val": 2, "test": 3}
WORDS = "scenes.json"


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield every file of the set: its path in the folder, and its content."""
    words: dict[str, list[tuple[str, ...]]] = {}
    for split, count in COUNTS.items():
        names = [f"{split}_{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            scene = generator.generate_scene(SEEDS[split], number)
            words[name] = [thing.attributes for thing in scene.objects]
            yield f"JPEGImages/{name}.png", scene.png()
            yield f"Annotations/{name}.xml", _xml(scene, name).encode()
        yield f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in names).encode()
    yield WORDS, json.dumps(words).encode()


def _xml(scene: generator.Scene, name: str) -> str:
    boxes_xyxy = torch.tensor([thing.box_xyxy for thing in scene.objects]).view(-1, 4)
    names = [thing.shape for thing in scene.objects]
    return writers.write_voc_xml(boxes_xyxy, names, (generator.SIZE_PX, generator.SIZE_PX), f"{name}.png")


SET = GeneratedDataset("scenes", 1, sum(COUNTS.values()), lambda: _files())  # noqa: PLW0108 - defined below
