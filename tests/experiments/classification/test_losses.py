"""Training losses of classifiers against slow definitions; balanced sampling; invalid configurations."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from cvlab import registry
from cvlab.experiments.classification import losses
from cvlab.experiments.classification.data.augment import Augmentation
from cvlab.experiments.classification.data.images import TrainLoader, balanced_order, build_normalization

LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.0], dtype=torch.float64)
SHORT = ("data.num_train=100", "duration={steps: 4}", "batch_size=20", "log_every=1", "expect=[]")


def logits():
    return 3 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build(name, **arguments):
    return registry.get("loss", name, losses.LOSSES.names)(**arguments)


def slow_loss(name, x, target, label_smoothing=0.0):
    """Return the loss of one image from its logits and the probabilities of its classes, in plain Python."""
    target = [t * (1 - label_smoothing) + label_smoothing / len(x) for t in target]
    p = [math.exp(a) / sum(map(math.exp, x)) for a in x]
    if name == "cross_entropy":
        return -sum(t * math.log(q) for t, q in zip(target, p, strict=True))
    if name == "focal":
        return -sum(t * (1 - q) ** 2 * math.log(q) for t, q in zip(target, p, strict=True))
    if name == "bce":
        s = [1 / (1 + math.exp(-a)) for a in x]
        return -sum(t * math.log(q) + (1 - t) * math.log(1 - q) for t, q in zip(target, s, strict=True))
    correct = target.index(1)
    return sum(max(0.0, a - x[correct] + 1) for k, a in enumerate(x) if k != correct)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", losses.LOSSES.names)
def test_each_loss_matches_its_definition(name, weights, smoothing):
    if name == "svm" and smoothing:
        pytest.skip("svm has no label smoothing")
    x = logits()
    loss = build(name, **({"label_smoothing": smoothing} if smoothing else {}))
    targets = F.one_hot(LABELS, 5).double()
    image_losses = [
        slow_loss(name, row, target, smoothing) for row, target in zip(x.tolist(), targets.tolist(), strict=True)
    ]
    factors = [1.0] * 6 if weights is None else weights.tolist()
    expected = sum(a * b for a, b in zip(image_losses, factors, strict=True)) / 6
    assert loss(x, LABELS, weights).item() == pytest.approx(expected, rel=1e-9)
    if name != "svm":
        assert loss(x, targets, weights).item() == pytest.approx(expected, rel=1e-9), "soft targets"
    assert torch.autograd.gradcheck(lambda values: loss(values, LABELS, weights), x.requires_grad_())


@pytest.mark.parametrize("name", ["cross_entropy", "bce", "focal"])
def test_the_loss_of_mixed_targets_matches_its_definition(name):
    x, targets = logits(), 0.3 * F.one_hot(LABELS, 5).double() + 0.7 * F.one_hot(LABELS.flip(0), 5)
    image_losses = [slow_loss(name, row, target) for row, target in zip(x.tolist(), targets.tolist(), strict=True)]
    assert build(name)(x, targets, None).item() == pytest.approx(sum(image_losses) / 6, rel=1e-9)


def test_focal_with_gamma_0_is_cross_entropy_and_svm_has_a_margin():
    x = logits()
    assert build("focal", gamma=0.0)(x, LABELS, None).item() == pytest.approx(F.cross_entropy(x, LABELS).item())
    expected = 5 * F.multi_margin_loss(x, LABELS, margin=3.0).item()
    assert build("svm", margin=3.0)(x, LABELS, None).item() == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_has_a_finite_gradient_for_certain_predictions(gamma):
    x = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    build("focal", gamma=gamma)(x, torch.tensor([0, 0]), None).backward()
    assert x.grad.isfinite().all()


def test_balanced_sampling_is_uniform_over_classes_and_images_of_a_class():
    labels = torch.tensor([0] * 70 + [2] * 25 + [5] * 5)
    num_seen = torch.zeros(100, dtype=torch.int64)
    for epoch in range(21):
        order = balanced_order(labels, 7, epoch)
        counts = labels[order].bincount()[[0, 2, 5]]
        assert counts.sum() == 100
        assert counts.max() - counts.min() <= 1
        num_seen += order.bincount(minlength=100)
        for label in (0, 2, 5):
            class_counts = num_seen[labels == label]
            assert class_counts.max() - class_counts.min() <= 1
    assert torch.equal(balanced_order(labels, 7, 3), balanced_order(labels, 7, 3))
    assert not torch.equal(balanced_order(labels, 7, 3), balanced_order(labels, 8, 3))


def test_balanced_batches_depend_only_on_seed_and_step():
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    labels = torch.tensor([0] * 45 + [1] * 5)
    normalize = build_normalization(images, "mean", torch.float32, torch.device("cpu"))
    loaders = [TrainLoader(images, labels, 10, 5, normalize, Augmentation(flip=True)) for _ in range(2)]
    for loader in loaders:
        loader.sampling = "balanced"
    batches = [loaders[0].get_batch(step) for step in range(12)]
    assert 55 <= sum(int(y.sum()) for _, y in batches) <= 65
    for step in (11, 3, 7):
        x, y = loaders[1].get_batch(step)
        assert torch.equal(x, batches[step][0])
        assert torch.equal(y, batches[step][1])


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss=bce", "label_smoothing=0.1", "augment={mixup: 0.2}", "class_weights=balanced"),
        ("loss={name: focal, gamma: 1.5}", "data.sampling=balanced"),
        ("loss={name: svm, margin: 2.0}", "class_weights=balanced", "layers=manual"),
        ("loss=svm", "precision=bfloat16"),
    ],
)
def test_each_loss_can_be_trained_from_the_command_line(overrides, cvlab):
    code, out, err = cvlab("train", "quickstart", *SHORT, *overrides, "--json")
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert 0 < metrics["train_loss"] < 50
    assert metrics["val_loss"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("loss=hinge",), "loss.*hinge"),
        (("loss={name: focal, gama: 1}",), "gamma"),
        (("loss={name: svm, margin: 0}",), "margin"),
        (("loss=svm", "augment={mixup: 0.2}"), "one class per image"),
        (("loss=svm", "label_smoothing=0.1"), "one class per image"),
        (("loss=bce", "skip_easy=0.5"), "skip_easy"),
        (("class_weights=balanced", "data.sampling=balanced"), "count twice"),
        (("data.sampling=equal",), "sampling"),
    ],
)
def test_incompatible_settings_are_rejected(overrides, message, cvlab):
    code, _, err = cvlab("train", "quickstart", *SHORT, *overrides)
    assert code == 2
    assert re.search(message, err), err


def test_the_regularization_is_logged_separately(cvlab):
    plain, regularized = (
        json.loads(cvlab("train", "quickstart", *SHORT, "duration={steps: 1}", f"reg={reg}", "--json")[1])["metrics"]
        for reg in ("0.0", "0.01")
    )
    assert "reg" not in plain
    assert regularized["reg"] > 0.01
    assert regularized["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5), (
        "both losses are those of the initial weights"
    )
