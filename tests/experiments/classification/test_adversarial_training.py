"""Adversarial training: examples against a plain loop, no side effects, validation, resuming, errors."""

import json
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.data import rng
from cvlab.distributed import process_group
from cvlab.engine import loop, optimizers
from cvlab.engine.device import ComputeContext
from cvlab.experiments.classification.adversarial_training import Adversary
from cvlab.experiments.classification.config import AdversarialConfig
from cvlab.experiments.classification.data.images import normalization
from tests.conftest import weights_digest

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SEED, STEP, EPS = 5, 7, 8 / 255
CPU = ComputeContext(torch.device("cpu"), "float32", 1)
SMALL = ("data.num_train=300", "duration={steps: 6}", "batch_size=50", "model.filters=[6]", "model.pools=[0]")
SHORT = ("quickstart", *SMALL, "expect=[]", "evaluate_test=false", "log_every=1", "save_seconds=0")
ADVERSARIAL = "adversarial={eps: 8, steps: 2, eval_images: 40, eval_steps: 3}"


def build_model():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 5))
    model = nn.Sequential(*layers)
    model[1].running_mean.uniform_(-0.5, 0.5)
    return model


@pytest.fixture
def batch():
    pixels = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    pixels[:3] = pixels[:3].round()  # black and white pixels, at the bounds of the valid range
    return normalize().of_pixels(pixels), torch.arange(12) % 5


def normalize():
    return normalization(MEAN, STD, torch.float32, torch.device("cpu"))


def adversary(num_parts=1, **keys):
    return Adversary(AdversarialConfig(**keys), normalize(), SEED, num_parts)


def mixed(batch):
    targets = F.one_hot(batch[1], 5).float()
    return batch[0], 0.7 * targets + 0.3 * targets.roll(1, 0)


@pytest.mark.parametrize(
    ("keys", "num_steps", "alpha"), [({"steps": 3}, 3, 2.5 * EPS / 3), ({"method": "fast"}, 1, 1.25 * EPS)]
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_examples_match_the_papers(batch, keys, num_steps, alpha, is_mixed):
    model = build_model().eval()
    images, labels = mixed(batch) if is_mixed else batch
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        pixels = (image * std + mean).clamp(0, 1)
        noise = rng.uniform_items(SEED, STEP, torch.tensor([number]), (3, 8, 8), "adversarial")[0]
        x = (pixels + EPS * (2 * noise - 1)).clamp(0, 1)
        for _ in range(num_steps):
            x = x.requires_grad_()
            F.cross_entropy(model(((x - mean) / std)[None]), label[None]).backward()
            change = (x.detach() + alpha * x.grad.sign() - pixels).clamp(-EPS, EPS)
            x = (pixels + change).clamp(0, 1)
        expected.append((x - mean) / std)
    examples, same_labels = adversary(eps=8, **keys)(model, (images, labels), STEP)
    torch.testing.assert_close(examples, torch.stack(expected), atol=1e-5, rtol=0)
    assert same_labels is labels
    assert ((examples - images).abs().amax((0, 2, 3)) * std.flatten() <= EPS + 1e-6).all()


def test_examples_do_not_depend_on_parts_or_processes(batch):
    model = build_model().eval()
    expected, _ = adversary()(model, batch, STEP)
    torch.testing.assert_close(adversary(num_parts=3)(model, batch, STEP)[0], expected, atol=1e-5, rtol=0)
    assert not adversary()(model, batch, STEP + 1)[0].equal(expected)
    for rank in (0, 1):
        shard = slice(6 * rank, 6 * rank + 6)
        with mock.patch.object(process_group, "world", return_value=mock.Mock(rank=rank, size=2)):
            examples, _ = adversary()(model, (batch[0][shard], batch[1][shard]), STEP)
        torch.testing.assert_close(examples, expected[shard], atol=1e-5, rtol=0)


def test_the_attack_has_no_side_effects(batch):
    """After a step, weights, statistics and random numbers equal those after a step on the examples."""

    def fit(model, **options):
        state = loop.TrainState(model, optimizers.build_optimizer("sgd", model, {"lr": 0.1}))
        torch.manual_seed(3)
        steps = loop.fit(
            state,
            lambda model, batch: {"loss": F.cross_entropy(model(batch[0]), batch[1])},
            options.pop("get_batch", lambda _: batch),
            lr_factor=lambda _: 1.0,
            ctx=CPU,
            **options,
        )
        next(steps)
        assert model.training
        return model.state_dict()

    for options in ({}, {"sam": 0.1}):
        attacked = fit(build_model(), attack=adversary(), **options)
        examples = adversary()(build_model().eval(), batch, 0)
        on_examples = fit(build_model(), get_batch=lambda _, examples=examples: examples, **options)
        assert all(value.equal(on_examples[name]) for name, value in attacked.items())
        assert not attacked["5.weight"].equal(fit(build_model(), **options)["5.weight"])


def test_gradients_of_confident_images_do_not_underflow_in_float16(batch):
    model = build_model().eval()
    images, _ = batch
    model[5].weight.data *= 40
    labels = model(images).argmax(1)
    assert F.cross_entropy(model(images), labels, reduction="none").min() < 1e-6
    exact, _ = adversary(method="fast")(model, (images, labels), STEP)
    with torch.autocast("cpu", torch.float16):
        examples, _ = adversary(method="fast")(model, (images, labels), STEP)
    assert examples.dtype == torch.float32
    assert (examples - exact).abs().gt(1e-3).float().mean() < 0.1


def test_a_run_resumes_bitwise_identically_and_selects_by_robust_accuracy(stopped_and_resumed, cvlab):
    uninterrupted, resumed = stopped_and_resumed(*SHORT, ADVERSARIAL, "expect=['val_robust_accuracy >= 0']")
    assert weights_digest(resumed) == weights_digest(uninterrupted)
    metrics = uninterrupted["metrics"]
    for name in ("val_robust_accuracy", "best_val_robust_accuracy", "train_loss"):
        assert resumed["metrics"][name] == metrics[name]
    assert metrics["val_robust_accuracy"] < metrics["val_accuracy"]
    assert "best_val_accuracy" not in metrics
    options = ("--on", "val", "--method", "pgd", "--eps", "8", "num_images=40", "steps=3")
    for weights, prefix in (("last", ""), ("best", "best_")):
        code, out, err = cvlab("attack", uninterrupted["run"], *options, f"weights={weights}", "--json")
        assert code == 0, err
        accuracy = json.loads(out)["metrics"]["pgd_accuracy/8"]
        assert accuracy == pytest.approx(metrics[f"{prefix}val_robust_accuracy"])


def test_adversarial_training_combines_with_all_other_settings(cvlab):
    other_keys = ("augment={mixup: 0.2, flip: true, cutout_px: 4}", "accumulate=2", "sam=0.05", "ema=0.9")
    keys = (
        "anomaly=true",
        "adversarial={method: fast, eval_eps: 0}",
        "precision=bfloat16",
        "layers=manual",
        "loss=focal",
    )
    code, out, err = cvlab("train", *SHORT, *other_keys, *keys, "duration={steps: 2}", "--json")
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert "best_val_accuracy" in metrics
    assert "val_robust_accuracy" not in metrics


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adversarial={eps: 0}",), "adversarial.eps"),
        (("adversarial={eps: 8, step: 3}",), "did you mean 'steps'"),
        (("adversarial={method: free}",), "adversarial.method"),
        (("adversarial={method: fast, steps: 7}",), "method fast takes one"),
        (("adversarial={}", "skip_easy=0.5"), "skip_easy compares the losses of images"),
        (("adversarial={}", "model=pretrained"), "stored features, which cannot be attacked"),
        (("adversarial={eval_eps: 0}", "expect=['val_robust_accuracy >= 0']"), "val_robust_accuracy"),
    ],
)
def test_errors_are_one_line(overrides, message, cvlab):
    code, _, err = cvlab("train", "quickstart", *overrides)
    assert code == 2
    assert message in err, err
    assert err.strip().count("\n") <= 1, err
