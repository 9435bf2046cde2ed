"""Captions of generated scenes."""

import torch

from cvlab.data.scenes.generator import Scene, SceneObject
from cvlab.experiments.captioning import scene_captions


def describe(*objects):
    return scene_captions.describe(Scene(torch.zeros(1), objects))


def scene_object(shape, color, x, y):
    return SceneObject(shape, color, (x - 10.0, y - 10.0, x + 10.0, y + 10.0), (0.0, 0.0), 1.0, 0.0)


def test_the_left_or_upper_object_comes_first():
    star, ring = scene_object("star", "red", 150, 100), scene_object("ring", "blue", 60, 110)
    assert describe(star) == "a red star"
    assert describe(star, ring) == describe(ring, star) == "a blue ring left of a red star"
    assert describe(star, scene_object("ring", "blue", 140, 20)) == "a blue ring above a red star"
    assert describe(star, scene_object("ring", "blue", 60, 20)) is None
    assert describe() is None


def test_parse_caption():
    parts = scene_captions.parse_caption("a blue ring left of a red star")
    assert parts == {"color": ("blue", "red"), "shape": ("ring", "star"), "relation": ("left of",)}
    assert scene_captions.parse_caption("a red star")["relation"] == ()
