"""`scenes`, the built-in detection data set: 224 px images of shapes in VOC's layout, generated once and checksummed.

`<root>/scenes-v1/` holds JPEGImages/*.png, Annotations/*.xml, ImageSets/Main/*.txt, scenes.json (a description of each
image's shapes: shape, color, size, position) and sha256.json. cvlab/data/scenes draws them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from cvlab.data import descriptions
from cvlab.data.generated import GeneratedDataset
from cvlab.data.scenes import generator
from cvlab.data.scenes.render import SHAPES
from cvlab.experiments.detection.data import voc, writers
from cvlab.experiments.detection.data.annotations import AnnotationSet
from cvlab.experiments.detection.data.dataset import AnnotatedSource

COUNTS = {"train": 480, "val": 120, "test": 200}
SEEDS = {"train": 1, "val": 2, "test": 3}
DESCRIPTIONS = "scenes.json"


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield every file of the data set: its path in the folder, and its content."""
    descriptions: dict[str, list[tuple[str, ...]]] = {}
    for split, count in COUNTS.items():
        names = [f"{split}_{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            scene = generator.generate_scene(SEEDS[split], number)
            descriptions[name] = [obj.attributes for obj in scene.objects]
            yield f"JPEGImages/{name}.png", scene.png()
            yield f"Annotations/{name}.xml", _xml(scene, name).encode()
        yield f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in names).encode()
    yield DESCRIPTIONS, json.dumps(descriptions).encode()


def _xml(scene: generator.Scene, name: str) -> str:
    """Return the VOC annotation of a scene."""
    boxes_xyxy = torch.tensor([obj.box_xyxy for obj in scene.objects]).view(-1, 4)
    names = [obj.shape for obj in scene.objects]
    return writers.write_voc_xml(boxes_xyxy, names, (generator.SIZE_PX, generator.SIZE_PX), f"{name}.png")


SET = GeneratedDataset("scenes", 1, sum(COUNTS.values()), lambda: _files())  # noqa: PLW0108 - defined below


def read(root: Path) -> AnnotationSet:
    """Read the data set, which is generated at first use."""
    return voc.read_folder(SET.folder(root), tuple(SHAPES))


SCENES = AnnotatedSource(
    **descriptions.of_source("boxes", "scenes"),
    read=read,
    check=SET.check,
)
