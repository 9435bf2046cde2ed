"""Batches: order and augmentation as pure functions of (seed, epoch, index), against slow references."""

import pytest
import torch
from torch import Tensor

from cvlab.data import rng
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.classification.data import images as images_module
from cvlab.experiments.classification.data.augment import Augmentation, tta_views
from cvlab.experiments.classification.data.hard_examples import HardExampleLoader
from cvlab.experiments.classification.data.images import (
    ImageDataset,
    ImageRows,
    TrainLoader,
    TransformedImages,
    build_normalization,
    count_steps_per_epoch,
    dataset_size,
    default_eval_batch_size,
    eval_batches,
    split,
)
from cvlab.ops.resample import EvalTransform

CPU = torch.device("cpu")
MASK_64 = (1 << 64) - 1


def random_images(count, size=6):
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def mix(x):
    """Compute the finalizer of SplitMix64 with Python's unbounded integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK_64
    return x ^ (x >> 31)


def slow_hash(seed, epoch, index, stream):
    import zlib

    golden = 0x9E3779B97F4A7C15
    key = 0
    for part in (seed, zlib.crc32(stream.encode()), epoch):
        key = mix((key ^ part) + golden & MASK_64)
    return mix(mix((index ^ key) + golden & MASK_64) + golden & MASK_64)


def test_hashes_equal_the_reference():
    indices = torch.tensor([0, 1, 2, 49_999, 2**40])
    for seed, epoch, stream in ((0, 0, "order"), (7, 3, "flip"), (2**31 - 1, 1000, "down")):
        hashes = rng.hashes(seed, epoch, indices, stream)
        assert [h & MASK_64 for h in hashes.tolist()] == [slow_hash(seed, epoch, i, stream) for i in indices.tolist()]


def test_uniform_numbers_are_uniform_and_independent():
    first, second = (rng.uniform(0, epoch, torch.arange(100_000), "flip") for epoch in (0, 1))
    assert first.min() >= 0
    assert first.max() < 1
    counts = torch.histc(first, 20, 0, 1)
    assert (counts - 5000).abs().max() < 350
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.015
    assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1]) < 0.015


def test_every_epoch_has_a_different_permutation():
    orders = [rng.permutation(seed, epoch, 1000, CPU) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert not any(torch.equal(a, b) for k, a in enumerate(orders) for b in orders[:k])


def test_a_batch_is_a_pure_function_of_its_step():
    images, labels = random_images(50), torch.randint(0, 3, (50,))
    normalize = build_normalization(images, "mean_std", torch.float32, CPU)

    def make_loader():
        return TrainLoader(images, labels, 8, 5, normalize, Augmentation(flip=True, translate_px=2))

    loader = make_loader()
    expected = [loader.get_batch(step) for step in range(20)]
    for step in (19, 3, 11, 0):
        batch = make_loader().get_batch(step)
        assert torch.equal(batch[0], expected[step][0])
        assert torch.equal(batch[1], expected[step][1])
    epoch = torch.cat([loader.batch_indices(step) for step in range(6)])
    assert len(epoch.unique()) == 48
    assert expected[0][0].is_contiguous(memory_format=torch.channels_last)


def test_later_epochs_skip_the_easiest_images():
    images, labels = random_images(50), torch.arange(50) % 3
    normalize = build_normalization(images, "mean", torch.float32, CPU)
    loader = HardExampleLoader(images, labels, 8, 5, normalize, skip_easy=0.5)
    plain = TrainLoader(images, labels, 8, 5, normalize)
    losses = torch.rand(50)
    for step in range(6):
        assert torch.equal(loader.get_batch(step)[0], plain.get_batch(step)[0]), "the first epoch uses all images"
        loader.record(losses[loader.batch_indices(step)])
    recorded = [loader.extra_state["losses"].isfinite().nonzero().flatten().tolist()]
    assert len(recorded[0]) == 48
    epochs = []
    for _ in range(2):
        losses_before = loader.extra_state["losses"].clone()
        indices = []
        for step in range(6 + 3 * len(epochs), 9 + 3 * len(epochs)):
            indices += loader.batch_indices(step).tolist()
            loader.record(losses[indices[-8:]] * (0.1 if indices[-1] % 2 else 1))
        hardest = sorted(range(50), key=lambda k: (-losses_before[k].item(), k))[:24]
        assert sorted(indices) == sorted(hardest)
        assert indices != sorted(indices)
        epochs.append(indices)
    assert epochs[0] != epochs[1]


def slow_augment(image: Tensor, flip: bool, down: int, right: int) -> Tensor:
    h, w, _ = image.shape
    out = torch.empty_like(image)
    for r in range(h):
        for c in range(w):
            source_r = r + down
            source_c = (w - 1 - c if flip else c) + right
            source_r = -source_r if source_r < 0 else 2 * (h - 1) - source_r if source_r >= h else source_r
            source_c = -source_c if source_c < 0 else 2 * (w - 1) - source_c if source_c >= w else source_c
            out[r, c] = image[source_r, source_c]
    return out


def test_augmentation_equals_the_reference():
    images, indices = random_images(40), torch.arange(100, 140)
    augmented = Augmentation(flip=True, translate_px=2)(images, indices, seed=3, epoch=2)
    flips = rng.uniform(3, 2, indices, "flip") < 0.5
    downs, rights = ((rng.uniform(3, 2, indices, s) * 5).long() - 2 for s in ("down", "right"))
    assert 5 < flips.sum() < 35
    assert set(downs.tolist()) == {-2, -1, 0, 1, 2}
    for k in range(40):
        expected = slow_augment(images[k], bool(flips[k]), int(downs[k]), int(rights[k]))
        assert torch.equal(augmented[k], expected), k


@pytest.mark.parametrize("flip", [True, "alternating"])
def test_flip_mirrors_whole_images(flip):
    images, indices = random_images(60), torch.arange(60)
    flips = []
    for epoch in range(3):
        augmented = Augmentation(flip)(images, indices, seed=1, epoch=epoch)
        mirrored = torch.tensor([torch.equal(augmented[k], images[k].flip(1)) for k in range(60)])
        assert all(torch.equal(augmented[k], images[k]) for k in range(60) if not mirrored[k])
        assert 15 < mirrored.sum() < 45
        flips.append(mirrored)
    assert torch.equal(flips[0], ~flips[1]) == (flip == "alternating")
    assert torch.equal(flips[0], flips[2]) == (flip == "alternating")


def test_cutout_blanks_one_square_inside_the_image():
    images, indices = torch.ones(200, 3, 8, 8), torch.arange(200)
    cut = Augmentation(cutout_px=3).cutout(images.clone(), indices, seed=0, epoch=4)
    assert torch.equal(cut, Augmentation(cutout_px=3).cutout(images.clone(), indices, 0, 4))
    rows, columns = (cut[:, 0] == 0).any(2), (cut[:, 0] == 0).any(1)
    assert torch.equal(cut == 0, (rows[:, :, None] & columns[:, None])[:, None].expand(-1, 3, -1, -1))
    for lines in (rows, columns):
        assert (lines.sum(1) == 3).all()
        assert set(lines.int().argmax(1).tolist()) == set(range(6))
    assert Augmentation().cutout(images, indices, 0, 0) is images


@pytest.mark.parametrize(("kind", "count"), [("flip", 2), ("flip_shift", 6)])
def test_views_of_test_time_augmentation(kind, count):
    images = torch.randn(4, 3, 6, 6)
    views = tta_views(images, kind)
    assert len(views) == count
    assert sum(weight for weight, _ in views) == 1
    assert all(view.shape == images.shape for _, view in views)
    assert torch.equal(views[0][1], images)
    assert torch.equal(views[1][1], images.flip(3))
    if kind == "flip_shift":
        assert torch.equal(views[2][1][:, :, 1:, 1:], images[:, :, :-1, :-1])
        assert torch.equal(views[4][1][:, :, :-1, :-1], images[:, :, 1:, 1:])
        assert torch.equal(views[2][1][:, :, 0], views[2][1][:, :, 2]), "the border is reflected"


def test_no_augmentation_returns_the_input():
    images = random_images(3)
    assert Augmentation()(images, torch.arange(3), 0, 0) is images


@pytest.mark.parametrize("kind", ["mean", "mean_std"])
def test_normalization_matches_its_definition(kind):
    images = random_images(300)
    x = images.double().div(255).reshape(-1, 3)
    normalize = build_normalization(images, kind, torch.float64, CPU)
    normalized = normalize(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(-1, 3)
    expected = x - x.mean(0)
    if kind == "mean_std":
        expected = expected / x.std(0, unbiased=False)
    torch.testing.assert_close(normalized, expected, rtol=1e-9, atol=1e-9)


def test_evaluation_uses_all_images_in_order():
    images, labels = random_images(1203), torch.arange(1203)
    normalize = build_normalization(images, "mean", torch.float32, CPU)
    batches = list(eval_batches(images, labels, normalize))
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), normalize(images.permute(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("size_px", "train_batch_size", "expected"),
    [(28, 64, 500), (32, 64, 500), (64, 64, 125), (160, 64, 64), (160, 8, 20), (2000, 1, 1), (160, 2000, 500)],
)
def test_evaluation_batches_have_a_bounded_number_of_pixels(size_px, train_batch_size, expected):
    images = torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(1203, size_px, size_px, 3)
    assert default_eval_batch_size(images, train_batch_size) == expected


def test_the_size_of_evaluation_batches_is_configurable():
    images, labels = random_images(23), torch.arange(23)
    normalize = build_normalization(images, "mean", torch.float32, CPU)
    assert [len(y) for _, y in eval_batches(images, labels, normalize, batch_size=10)] == [10, 10, 3]


def make_dataset(**changes):
    content = {
        "name": "x",
        "train_images": random_images(100),
        "train_labels": torch.arange(100) % 3,
        "test_images": random_images(10),
        "test_labels": torch.arange(10) % 3,
        "classes": ("a", "b", "c"),
    }
    return ImageDataset(**(content | changes))


def test_train_is_the_first_part_and_val_the_last_part():
    dataset = make_dataset()
    splits = split(dataset, 0.2, 30)
    assert torch.equal(splits["train"][0], dataset.train_images[:30])
    assert torch.equal(splits["val"][0], dataset.train_images[80:])
    assert torch.equal(splits["test"][1], dataset.test_labels)
    assert len(split(dataset, 0.2, None)["train"][0]) == 80
    assert dataset_size(dataset).num_classes == 3
    without_val = split(dataset, 0.0, None)
    assert len(without_val["train"][0]) == 100
    assert "val" not in without_val


@pytest.mark.parametrize(("fraction", "num_train"), [(0.2, 81), (0.999, None), (0.001, 10)])
def test_empty_splits_are_rejected(fraction, num_train):
    with pytest.raises(ConfigError, match=r"data\.num_train"):
        split(make_dataset(), fraction, num_train)


def test_a_batch_larger_than_the_data_is_rejected():
    assert count_steps_per_epoch(100, 100) == 1
    with pytest.raises(ConfigError, match="batch_size 101 is larger than the training set of 100"):
        count_steps_per_epoch(100, 101)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train_images": random_images(0), "train_labels": torch.zeros(0, dtype=torch.int64)}, "no train images"),
        ({"test_images": torch.rand(10, 6, 6, 3)}, "must be uint8"),
        ({"train_labels": torch.arange(99)}, "as many labels"),
        ({"train_labels": torch.full((100,), 3)}, "outside 0..2"),
        (
            {"classes": ("a",), "train_labels": torch.zeros(100).long(), "test_labels": torch.zeros(10).long()},
            "one class",
        ),
    ],
)
def test_unusable_data_sets_are_rejected(changes, text):
    with pytest.raises(DataError, match=text):
        make_dataset(**changes)


def test_the_batch_sampler_visits_every_item_once_per_epoch():
    sampler = rng.BatchSampler(3, 10, 4, torch.device("cpu"))
    batches = [sampler(step) for step in range(6)]
    assert sampler.steps_per_epoch == 2
    assert [epoch for epoch, _ in batches] == [0, 0, 1, 1, 2, 2]
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert len(set(first[1].tolist() + second[1].tolist())) == 8
    assert batches[0][1].tolist() != batches[2][1].tolist()
    assert sampler(1)[1].tolist() == batches[1][1].tolist()
    small = rng.BatchSampler(3, 3, 4, torch.device("cpu"))
    assert (small.steps_per_epoch, small.batch_size) == (1, 3)
    assert sorted(small(5)[1].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("free", [None, 10**9, 0])
def test_rows_that_exceed_the_memory_of_a_device_are_moved_batch_by_batch(free, monkeypatch):
    pixels = random_images(8)
    rows = ImageRows(pixels, torch.tensor([5, 3, 1]), ("a", "b", "c"))
    assert rows.to(CPU) is rows
    monkeypatch.setattr(images_module.memory, "free_bytes", lambda device: free)
    moved = rows.to(torch.device("meta"))
    assert isinstance(moved, ImageRows) == (free == 0)
    assert moved.device.type == "meta"
    if free == 0:
        for batch in (moved[torch.tensor([2, 0])], moved.rows(slice(1, 3))[:]):
            assert (batch.device.type, batch.shape, batch.dtype) == ("meta", (2, 6, 6, 3), torch.uint8)
    transform = EvalTransform(4, 4)
    assert TransformedImages(rows, transform).to(torch.device("meta"))[:2].device.type == "meta"
