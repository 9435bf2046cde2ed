"""Batches of feature maps: from a cache, and from new views in every epoch."""

import pytest
import torch

from cvlab.engine import device
from cvlab.experiments.detection import feature_cache
from cvlab.experiments.detection.config import AugmentConfig
from cvlab.experiments.detection.data import dataset
from cvlab.experiments.detection.feature_cache import CachedBatches, FeatureCacheConfig, FreshBatches
from cvlab.models import backbone, names, pretrained
from cvlab.models.features import FeatureExtractor
from cvlab.storage.cache import data_root

CONFIG = FeatureCacheConfig(size_px=64, num_views=1, augment=AugmentConfig(), seed=3, title="maps")


@pytest.fixture(scope="module")
def parts():
    model = pretrained.build(names.NANODET)
    extractor = FeatureExtractor(model, backbone.feature_layers(model, (8, 16, 32)))
    samples = dataset.load("scenes", data_root()).splits["train"][:5]
    return extractor, samples, device.select_device("cpu", "float32", 1)


def fresh_batches(parts):
    return FreshBatches(*parts, CONFIG, batch_size=2)


def test_the_first_epoch_has_the_views_of_a_cache_with_one_view(parts):
    cached = CachedBatches(feature_cache.build(*parts, CONFIG, lambda: None), 2, CONFIG.seed, parts[2].device)
    for step in range(2):
        maps, targets = fresh_batches(parts)(step)
        expected_maps, expected_targets = cached(step)
        assert all(torch.allclose(m, e, atol=1e-4) for m, e in zip(maps, expected_maps, strict=True))
        assert torch.equal(targets.boxes_xyxy, expected_targets.boxes_xyxy)
        assert torch.equal(targets.labels, expected_targets.labels)


def test_a_batch_depends_only_on_the_step(parts):
    first, second = fresh_batches(parts), fresh_batches(parts)
    second(0)
    assert torch.equal(first(3)[0][0], second(3)[0][0])


def test_the_next_epoch_has_different_views(parts):
    batches = FreshBatches(*parts, CONFIG, batch_size=5)
    _, first = batches(0)
    _, second = batches(1)
    assert set(first.boxes_xyxy.flatten().tolist()) != set(second.boxes_xyxy.flatten().tolist())


def test_fine_tuning_uses_only_the_finest_map(parts):
    batches = fresh_batches(parts)
    batches.finest_from = 1
    assert [len(batches(step)[0]) for step in (0, 1)] == [3, 1]


def test_maps_can_be_used_for_training(parts):
    maps, _ = fresh_batches(parts)(0)
    weight = torch.ones(1, requires_grad=True)
    (maps[0] * weight).sum().backward()
    assert weight.grad is not None
