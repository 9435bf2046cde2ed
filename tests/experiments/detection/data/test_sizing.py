"""Automatic sizes: the input size by the size of boxes, the number of views by the number of photos."""

import pytest
import torch
from PIL import Image

from cvlab.config import loading
from cvlab.experiments.detection.data import sizing
from cvlab.experiments.detection.data.dataset import DetectionDataset, DetectionSample


def make_dataset(folder, side, count=3):
    samples = []
    for k in range(count):
        path = folder / f"{k}.png"
        Image.new("RGB", (400, 200)).save(path)
        boxes = torch.tensor([[10.0, 10, 10 + side, 10 + side], [0, 0, 1, 1]])
        samples.append(DetectionSample(path, boxes, torch.zeros(2).long(), torch.tensor([False, True])))
    return DetectionDataset("boxes", ("square",), {"train": tuple(samples), "val": (), "test": ()})


@pytest.fixture
def config():
    return loading.load("yolo", ["data.path=somewhere"]).config


@pytest.mark.parametrize(("side", "size_px"), [(100, 416), (24, 416), (20, 512), (15, 640), (4, 640)])
def test_smaller_boxes_get_larger_inputs(tmp_path, config, side, size_px):
    assert sizing.input_size(config, make_dataset(tmp_path, side)) == size_px


def test_photos_without_boxes_get_the_smallest_input(tmp_path, config):
    path = make_dataset(tmp_path, 100).splits["train"][0].path
    empty = DetectionSample(path, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())
    assert sizing.input_size(config, DetectionDataset("boxes", ("a",), {"train": (empty,)})) == 416


@pytest.mark.parametrize(("count", "views"), [(3, 64), (100, 30), (3000, 1), (10_000, 0)])
def test_few_photos_get_many_views(tmp_path, config, count, views):
    samples = make_dataset(tmp_path, 100, 1).splits["train"]
    assert sizing.num_views(config, DetectionDataset("boxes", ("a",), {"train": samples * count})) == views


def test_explicit_sizes_are_kept(tmp_path, config):
    explicit = config.model_copy(update={"size": 320, "views": 2})
    assert sizing.input_size(explicit, make_dataset(tmp_path, 4)) == 320
    assert sizing.num_views(explicit, make_dataset(tmp_path, 4)) == 2
