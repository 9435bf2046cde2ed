"""Attacks on batches: their bounds, a comparison with weaker attacks, and a simple reference of Auto-PGD."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.ops import linf_attacks

EPS = 0.05


@pytest.fixture(scope="module")
def problem():
    """Return a small network, images, and the classes that it predicts for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).requires_grad_(False)
    images = torch.rand(40, 3, 8, 8)
    return model, images, model(images).argmax(1)


def uniform_noise(indices):
    """Return a function whose random numbers depend on the indices of the image and of the draw only."""

    def uniform(draw, shape):
        rows = [torch.rand(shape[1:], generator=torch.Generator().manual_seed(1000 * draw + n)) for n in indices]
        return torch.stack(rows)

    return uniform


UNIFORM = uniform_noise(range(40))
ATTACKS = {
    "fgsm": linf_attacks.fgsm,
    "pgd": lambda *a: linf_attacks.pgd(*a, steps=8, alpha=EPS / 4, uniform=UNIFORM, restarts=2),
    "apgd_ce": lambda *a: linf_attacks.apgd(*a, loss_fn=linf_attacks.cross_entropy, steps=10, uniform=UNIFORM),
    "apgd_dlr": lambda *a: linf_attacks.apgd(*a, loss_fn=linf_attacks.dlr_loss, steps=10, uniform=UNIFORM, restarts=2),
    "square": lambda *a: linf_attacks.square(*a, queries=60, uniform=UNIFORM),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_adversarial_examples_stay_within_the_bound_and_are_misclassified(problem, name):
    model, images, labels = problem
    before = images.clone()
    examples = ATTACKS[name](model, images, labels, EPS)
    assert images.equal(before)
    assert (examples - images).abs().max() <= EPS + 1e-6
    assert examples.min() >= 0
    assert examples.max() <= 1
    assert linf_attacks.misclassified(model, examples, labels).sum() >= 4
    assert not examples.requires_grad


def test_pgd_succeeds_wherever_fgsm_does(problem):
    model, images, labels = problem
    for eps in (0.01, 0.03, EPS):
        by_fgsm = linf_attacks.misclassified(model, linf_attacks.fgsm(model, images, labels, eps), labels)
        examples = linf_attacks.pgd(model, images, labels, eps, steps=8, alpha=eps / 4, uniform=UNIFORM)
        by_pgd = linf_attacks.misclassified(model, examples, labels)
        assert (by_pgd | ~by_fgsm).all()
    assert by_pgd.sum() > by_fgsm.sum()


def test_an_example_does_not_depend_on_the_batch(problem):
    model, images, labels = problem
    attacks = {
        "pgd": {"steps": 6, "alpha": EPS / 4, "restarts": 2},
        "apgd": {"steps": 6, "restarts": 2, "loss_fn": linf_attacks.dlr_loss},
        "square": {"queries": 30},
    }
    for name, options in attacks.items():
        attack = getattr(linf_attacks, name)
        all_examples = attack(model, images, labels, EPS, uniform=uniform_noise(range(40)), **options)
        half_examples = attack(model, images[20:], labels[20:], EPS, uniform=uniform_noise(range(20, 40)), **options)
        torch.testing.assert_close(half_examples, all_examples[20:], atol=1e-6, rtol=0)


def test_transferable_examples_take_all_steps(problem):
    model, images, labels = problem
    options = {"steps": 8, "alpha": EPS / 4, "uniform": UNIFORM}
    losses = []
    for stops_early in (False, True):
        examples = linf_attacks.pgd(model, images, labels, EPS, stops_early=stops_early, **options)
        losses.append(linf_attacks.margin_loss(model(examples), labels).mean())
    assert losses[0] > losses[1]


def test_dlr_loss_and_margin():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 4.0, 2.0, 1.0]])
    labels = torch.tensor([0, 2])
    assert linf_attacks.margin_loss(logits, labels).tolist() == [-2, 2]
    assert linf_attacks.dlr_loss(logits, labels).tolist() == pytest.approx([-2 / 3, 2 / 3])
    scaled = linf_attacks.dlr_loss(10 * logits + 5, labels)
    torch.testing.assert_close(scaled, linf_attacks.dlr_loss(logits, labels))


def test_checkpoints_match_the_paper():
    assert linf_attacks.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99, 100]


def test_squares_shrink():
    assert linf_attacks.square_fraction(1, 10_000) == 0.8
    assert linf_attacks.square_fraction(11, 10_000) == 0.4
    assert linf_attacks.square_fraction(9_000, 10_000) == pytest.approx(0.8 / 2**9)


def slow_apgd(model, image, label, start, eps, steps):
    """Run Auto-PGD on one image as in algorithm 1 of the paper, to the end or until it is misclassified."""

    def evaluate(x):
        x = x.detach().requires_grad_()
        logits = model(x[None])
        loss = F.cross_entropy(logits, torch.tensor([label]))
        loss.backward()
        return loss.item(), x.grad, logits.argmax().item() != label

    def clip(x):
        return torch.max(torch.min(x, image + eps), image - eps).clamp(0, 1)

    improvements, size_history, best_history = [], [2 * eps], []
    x = previous_x = start
    loss, gradient, is_wrong = evaluate(x)
    if is_wrong:
        return x
    best, best_x, best_gradient = loss, x, gradient
    best_history.append(best)
    size, checkpoint_steps, last_checkpoint = 2 * eps, linf_attacks.checkpoints(steps), 0
    for step in range(1, steps + 1):
        z = clip(x + size * gradient.sign())
        a = 0.75 if step > 1 else 1.0
        x, previous_x = clip(x + a * (z - x) + (1 - a) * (x - previous_x)), x
        previous_loss = loss
        loss, gradient, is_wrong = evaluate(x)
        if is_wrong:
            return x
        improvements.append(loss > previous_loss)
        if loss > best:
            best, best_x, best_gradient = loss, x, gradient
        if step in checkpoint_steps:
            is_slow = sum(improvements) < 0.75 * (step - last_checkpoint)
            is_stuck = best == best_history[-1] and (size == size_history[-1] or not last_checkpoint)
            size_history.append(size)
            best_history.append(best)
            if is_slow or is_stuck:
                size, x, loss, gradient = size / 2, best_x, best, best_gradient
            improvements, last_checkpoint = [], step
    return best_x


def test_apgd_equals_the_slow_reference(problem):
    model, images, labels = problem
    eps = 0.02
    options = {"steps": 25, "uniform": UNIFORM, "loss_fn": linf_attacks.cross_entropy}
    examples = linf_attacks.apgd(model, images, labels, eps, **options)
    noise = UNIFORM(0, tuple(images.shape))
    starts = (images + (2 * noise - 1) * eps).clamp(0, 1)
    for k in range(12):
        expected = slow_apgd(model, images[k], labels[k].item(), starts[k], eps, 25)
        torch.testing.assert_close(examples[k], expected, atol=1e-5, rtol=0)
