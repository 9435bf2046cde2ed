"""Transforms of torchvision, MixUp and CutMix: pure functions of (seed, epoch, index) and of (seed, step)."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from cvlab.distributed import sharding
from cvlab.experiments.classification import setup
from cvlab.experiments.classification.data.augment import Augmentation
from cvlab.experiments.classification.data.images import TrainLoader, build_normalization

torch.manual_seed(0)
IMAGES = torch.randint(0, 256, (24, 12, 12, 3), dtype=torch.uint8)
LABELS = torch.arange(24) % 4
TRANSFORMS = [{"rotate": 30.0}, {"color": 0.4}, {"policy": "trivial"}, {"policy": "rand"}]
MIXTURES = [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}]


def loader(**keys):
    normalize = build_normalization(IMAGES, "mean_std", torch.float32, torch.device("cpu"))
    return TrainLoader(IMAGES, LABELS, 8, 5, normalize, Augmentation(**keys))


@pytest.mark.parametrize("keys", TRANSFORMS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_depends_only_on_seed_index_and_epoch(keys, channels):
    augment, indices, images = Augmentation(**keys), torch.arange(24), IMAGES[..., :channels]
    state = torch.get_rng_state()
    augmented = augment(images, indices, 3, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (augmented.shape, augmented.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(augmented, images)
    assert torch.equal(augment(images[7:9], indices[7:9], 3, 1), augmented[7:9])
    assert not torch.equal(augment(images, indices, 3, 2), augmented)
    assert not torch.equal(augment(images, indices, 4, 1), augmented)


def test_rotation_reflects_the_borders():
    constant = torch.full((4, 9, 9, 3), 77, dtype=torch.uint8)
    assert torch.equal(Augmentation(rotate=180)(constant, torch.arange(4), 0, 0), constant)


def test_erasing_sets_a_rectangle_to_the_mean_with_the_given_probability():
    images = torch.ones(200, 3, 12, 12)
    erased = Augmentation(erase=0.25).cutout(images.clone(), torch.arange(200), 1, 0)
    fraction = (erased == 0).flatten(1).any(1).float().mean()
    assert 0.15 < fraction < 0.35
    assert torch.equal(
        Augmentation(erase=0.25).cutout(images[40:50].clone(), torch.arange(40, 50), 1, 0), erased[40:50]
    )


@pytest.mark.parametrize("keys", MIXTURES, ids=str)
def test_each_image_is_mixed_with_the_previous_one(keys):
    plain_images, labels = loader().get_batch(4)
    images, targets = loader(**keys).get_batch(4)
    assert (images.shape, targets.shape) == (plain_images.shape, (8, 4))
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    weight = float(targets[0, labels[0]]) if labels[0] != labels[-1] else None
    one_hot = F.one_hot(labels, 4).float()
    for k in range(8):
        if weight is not None:
            torch.testing.assert_close(targets[k], weight * one_hot[k] + (1 - weight) * one_hot[k - 1])
    if weight is not None and "cutmix" not in keys:
        torch.testing.assert_close(images, weight * plain_images + (1 - weight) * plain_images.roll(1, 0))
    if "mixup" not in keys:
        is_current, is_previous = images == plain_images, images == plain_images.roll(1, 0)
        assert (is_current | is_previous).all()


def test_the_target_of_cutmix_is_the_area_fraction():
    for step in range(9):
        plain, labels = loader().get_batch(step)
        images, targets = loader(cutmix=1.0).get_batch(step)
        k = next(k for k in range(8) if labels[k] != labels[k - 1])
        fraction = (images[k] == plain[k]).float().mean()
        # pixels that are equal in both images are rare
        assert float(targets[k, labels[k]]) == pytest.approx(float(fraction), abs=0.02)


@pytest.mark.parametrize("keys", [*MIXTURES, {"policy": "trivial", "erase": 0.5, "mixup": 0.2}], ids=str)
def test_the_shards_of_all_ranks_form_the_batch(keys):
    images, targets = loader(**keys).get_batch(3)
    shards = []
    for rank in range(2):
        with mock.patch.object(sharding, "world", return_value=mock.Mock(rank=rank, size=2)):
            shards.append(loader(**keys).get_batch(3))
    assert torch.equal(torch.cat([shard[0] for shard in shards]), images)
    assert torch.equal(torch.cat([shard[1] for shard in shards]), targets)


@pytest.mark.parametrize("keys", MIXTURES, ids=str)
def test_a_batch_does_not_depend_on_previous_ones(keys):
    continued = loader(policy="trivial", erase=0.5, **keys)
    for step in range(5):  # epochs have 3 steps
        batch = continued.get_batch(step)
    for actual, expected in zip(batch, loader(policy="trivial", erase=0.5, **keys).get_batch(4), strict=True):
        assert torch.equal(actual, expected)


def test_the_accuracy_of_mixed_targets_is_the_target_of_the_prediction():
    logits, targets = torch.eye(3)[:2], torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.25, 0.25]])
    assert setup.batch_accuracy(logits, targets) == pytest.approx((0.7 + 0.25) / 2)
    assert setup.batch_accuracy(logits, torch.tensor([0, 2])) == 0.5


ALL = "augment={crop: [0.6, 1.0], rotate: 10, color: 0.4, policy: trivial, erase: 0.25, mixup: 0.2, cutmix: 1.0}"


@pytest.mark.parametrize("options", [(), ("class_weights=balanced", "label_smoothing=0.1")])
def test_a_run_with_all_augmentations(options, cvlab):
    code, _, err = cvlab(
        "train", "quickstart", ALL, *options, "data.num_train=64", "batch_size=16", "duration={steps: 3}", "expect=[]"
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=pretrained", "augment={mixup: 0.2}"], "not for features of a pretrained model"),
        (["skip_easy=0.3", "augment={cutmix: 1.0}"], "cannot be used with mixup or cutmix"),
        (["augment={policy: auto}"], "augment.policy"),
        (["augment={rotate: 200}"], "augment.rotate"),
    ],
)
def test_invalid_combinations_are_rejected(overrides, message, cvlab):
    code, _, err = cvlab("train", "quickstart", *overrides, "--dry-run")
    assert code == 2
    assert message in err
