"""DeepFool and Carlini-Wagner against simple references and, if installed, adv-lib."""

import math

import pytest
import torch
from torch import nn

from cvlab import _compat
from cvlab.ops import l2_attacks, linf_attacks

COUNT = 6


@pytest.fixture(scope="module")
def problem():
    """Return a small network, images, and the classes that it predicts for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)).requires_grad_(False)
    images = 0.2 + 0.6 * torch.rand(COUNT, 3, 8, 8)
    return model, images, model(images).argmax(1)


def run_deepfool(model, image, label, target=None, steps=50):
    candidates = torch.tensor([k for k in range(5) if k != label]) if target is None else None
    for _ in range(steps):
        prediction = int(model(image[None]).argmax())
        if prediction == target or (target is None and prediction != label):
            break
        image = l2_attacks.deepfool_step(model, image, label if target is None else target, candidates)
    return image


def slow_deepfool(model, image, label):
    """Algorithm 2 of the paper, class by class."""
    x = image.clone()
    while int(model(x[None]).argmax()) == label:
        x.requires_grad_()
        logits = model(x[None])[0]
        gradients = [torch.autograd.grad(logits[k], x, retain_graph=True)[0] for k in range(5)]
        x = x.detach()
        steps = {}
        for k in set(range(5)) - {label}:
            w = gradients[k] - gradients[label]
            f = (logits[k] - logits[label]).detach()
            steps[k] = ((f.abs() / w.norm() + 1e-4) / w.norm() * w, f.abs() / w.norm())
        step, _ = min(steps.values(), key=lambda pair: pair[1])
        x = (x + 1.02 * step).clamp(0, 1)
    return x


def slow_carlini_wagner(model, image, margin_fn, const, steps):
    """Run the attack of section V-A with one constant and Adam written out; margin_fn(logits) < 0 means success."""
    w = torch.atanh((2 * image - 1) * (1 - 1e-6))
    mean = square = torch.zeros_like(w)
    best, best_l2 = None, math.inf
    for t in range(1, steps + 1):
        w.requires_grad_()
        x = (w.tanh() + 1) / 2
        l2, margin = (x - image).square().sum(), margin_fn(model(x[None])[0])
        if margin < 0 and l2 < best_l2:
            best, best_l2 = x.detach(), l2.detach()
        (gradient,) = torch.autograd.grad(l2 + const * margin.clamp(min=0), w)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        lr = 0.01 * (1 - (t - 1) / steps)
        w = w.detach() - lr * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
    return best


def run_carlini_wagner(model, images, classes, targeted=False, **options):
    settings = {"steps": 60, "search_steps": 3, "is_fooled": lambda k, image: True} | options
    attack = l2_attacks.carlini_wagner(
        lambda batch: model(torch.stack(list(batch))),
        list(images),
        classes,
        targeted,
        scales=[1.0] * len(images),
        **settings,
    )
    return torch.stack(list(attack)[-1])


def l2(examples, images):
    return (examples - images).flatten(1).norm(dim=1)


def test_deepfool_matches_the_paper(problem):
    model, images, labels = problem
    for image, label in zip(images, labels.tolist(), strict=True):
        torch.testing.assert_close(run_deepfool(model, image, label), slow_deepfool(model, image, label))


def test_deepfool_reaches_a_target(problem):
    model, images, labels = problem
    targets = (labels + 1) % 5
    examples = torch.stack([run_deepfool(model, i, None, int(t)) for i, t in zip(images, targets, strict=True)])
    assert model(examples).argmax(1).equal(targets)
    untargeted = torch.stack([run_deepfool(model, i, int(k)) for i, k in zip(images, labels, strict=True)])
    assert l2(examples, images).mean() >= l2(untargeted, images).mean()


@pytest.mark.parametrize("targeted", [False, True])
def test_carlini_wagner_matches_the_paper(problem, targeted):
    model, images, labels = problem
    classes = (labels + 1) % 5 if targeted else labels
    examples = run_carlini_wagner(
        model, images[:3], classes[:3], targeted, search_steps=1, initial_const=20.0, steps=29
    )

    def margin(logits, k):
        others = torch.cat([logits[:k], logits[k + 1 :]]).max()
        return others - logits[k] if targeted else logits[k] - others

    for image, k, example in zip(images, classes.tolist(), examples, strict=False):
        expected = slow_carlini_wagner(model, image, lambda logits, k=k: margin(logits, k), 20.0, 29)
        torch.testing.assert_close(example, expected, atol=1e-5, rtol=1e-4)


def test_carlini_wagner_finds_smaller_perturbations_than_deepfool(problem):
    model, images, labels = problem

    def misclassifies(image, k):
        return bool(model(image[None]).argmax() != labels[k])

    examples = run_carlini_wagner(model, images, labels)
    assert linf_attacks.misclassified(model, examples, labels).all()
    deepfool_examples = torch.stack([run_deepfool(model, i, int(k)) for i, k in zip(images, labels, strict=True)])
    assert l2(examples, images).mean() <= l2(deepfool_examples, images).mean()
    confident = run_carlini_wagner(model, images, labels, confidence=0.3, search_steps=1, initial_const=20.0)
    assert (l2_attacks.attack_margins(model(confident), labels, False) <= -0.3).all()
    rounded = run_carlini_wagner(
        model, images, labels, search_steps=1, initial_const=20.0, is_fooled=lambda k, x: misclassifies(quantize(x), k)
    )
    assert linf_attacks.misclassified(model, quantize(rounded), labels).all()


def quantize(pixels):
    return (pixels * 255).round() / 255


def test_perturbations_are_as_small_as_those_of_adv_lib(problem):
    _compat.torchvision()  # imported by adv-lib
    deepfool_module = pytest.importorskip("adv_lib.attacks.deepfool")
    cw_module = pytest.importorskip("adv_lib.attacks.carlini_wagner.l2")
    model, images, labels = problem
    actual = torch.stack([run_deepfool(model, i, int(k)) for i, k in zip(images, labels, strict=True)])
    torch.testing.assert_close(actual, deepfool_module.df(model, images, labels), atol=1e-5, rtol=1e-4)
    expected = cw_module.carlini_wagner_l2(
        model, images, labels, binary_search_steps=4, max_iterations=150, initial_const=1.0
    )
    ratio = l2(run_carlini_wagner(model, images, labels, steps=150, search_steps=4), images) / l2(expected, images)
    assert ratio.median() <= 1.02
    assert ratio.max() <= 1.1
