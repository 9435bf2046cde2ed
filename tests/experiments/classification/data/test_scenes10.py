"""scenes10: reproducible from its seed, cached and verified, neither too hard nor too easy."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.data.scenes import render
from cvlab.errors import DataError
from cvlab.experiments.classification.data import scenes10
from cvlab.experiments.classification.models.convnet import deep_convnet
from cvlab.storage.cache import data_root


def test_drawing_is_a_pure_function_of_the_seed():
    first, second, other = scenes10.draw(100, 1), scenes10.draw(100, 1), scenes10.draw(100, 2)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (100, 32, 32, 3)
    assert torch.bincount(first[1]).tolist() == [10] * 10


@pytest.mark.parametrize("shape", render.SHAPES)
def test_every_shape_is_completely_visible(shape):
    x, y = render.pixel_grid(64)
    size = torch.tensor([0.5])
    coverage = render.shape_coverage(shape, x, y, torch.zeros(1, 2), size, torch.zeros(1), 64)[0]
    assert coverage.min() == 0
    assert coverage.max() == 1
    rows, columns = (coverage > 0.5).any(1).nonzero(), (coverage > 0.5).any(0).nonzero()
    assert rows.min() >= 14, "approximately within a circle of the radius"
    assert rows.max() <= 49, "approximately within a circle of the radius"
    assert columns.min() >= 14
    assert columns.max() <= 49
    larger = render.shape_coverage(shape, x, y, torch.zeros(1, 2), 1.5 * size, torch.zeros(1), 64)[0]
    assert larger.sum() / coverage.sum() == pytest.approx(2.25, rel=0.08)


def test_shapes_differ():
    x, y = render.pixel_grid(32)
    coverages = [
        render.shape_coverage(s, x, y, torch.zeros(1, 2), torch.tensor([0.7]), torch.zeros(1), 32)
        for s in render.SHAPES
    ]
    for k, coverage in enumerate(coverages):
        assert all((coverage - other).abs().sum() > 30 for other in coverages[:k])


def test_the_data_set_is_cached_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes10, "NUM_TRAIN", 250)
    monkeypatch.setattr(scenes10, "NUM_TEST", 50)
    monkeypatch.setattr(scenes10, "CHUNK", 100)
    dataset = scenes10.load(tmp_path)
    assert scenes10.ready(tmp_path)
    assert (len(dataset.train_images), len(dataset.test_images)) == (250, 50)
    reloaded = scenes10.load(tmp_path)
    assert torch.equal(dataset.train_images, reloaded.train_images)
    assert torch.equal(dataset.test_labels, reloaded.test_labels)
    assert scenes10.check(tmp_path) == "4 files equal to their checksums"
    path = tmp_path / scenes10.FOLDER / "train_images.npy"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"train_images\.npy: damaged"):
        scenes10.load(tmp_path)
    path.write_bytes(raw[:100])
    with pytest.raises(DataError, match="cannot be read"):
        scenes10.load(tmp_path)


def test_the_data_set_loads_without_a_writable_folder(tmp_path, data_root, monkeypatch):
    (tmp_path / "file").touch()
    small = {name: array[:50] for name, array in scenes10._read(data_root).items()}
    monkeypatch.setattr(scenes10, "generate", lambda: small)
    assert len(scenes10.load(tmp_path / "file").train_images) == 50


def test_a_cache_cannot_run_code(tmp_path):
    class Canary:
        def __reduce__(self):
            return os.system, ("touch canary",)

    scenes10._store(tmp_path, {"train_images": np.zeros(3)})
    np.save(tmp_path / scenes10.FOLDER / "train_images.npy", np.array([Canary()]), allow_pickle=True)
    with pytest.raises(DataError):
        scenes10.load(tmp_path)
    assert not os.path.exists("canary")


@pytest.mark.slow
def test_a_linear_model_stays_below_half_and_a_convnet_exceeds_nine_tenths():
    torch.set_num_threads(1)  # several threads would be slower with such small batches
    dataset = scenes10.load(data_root())
    x, y = ((t.permute(0, 3, 1, 2).float() / 255 - 0.45) for t in (dataset.train_images, dataset.test_images))
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    convnet = deep_convnet(filters=(16, 32, 64), pools=(0, 1, 2), batchnorm=True)
    accuracy = {}
    for name, model, lr in (("linear", linear, 2e-3), ("convnet", convnet, 1e-2)):
        optimizer = torch.optim.Adam(model.parameters())
        batches = torch.randperm(len(x)).split(50)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches), pct_start=0.2)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), dataset.train_labels[batch]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            accuracy[name] = (model.eval()(y).argmax(1) == dataset.test_labels).float().mean().item()
    assert 0.1 < accuracy["linear"] < 0.5, accuracy
    assert accuracy["convnet"] > 0.9, accuracy
