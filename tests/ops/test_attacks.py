"""Steps, objective and distances of adversarial attacks."""

import numpy as np
import pytest
import torch

from cvlab.ops import attacks


def test_steps():
    torch.manual_seed(0)
    x, g = torch.full((3, 5, 5), 0.5), torch.randn(3, 5, 5)
    moved = attacks.l2_step(x, g, 0.1)
    assert (moved - x).norm().item() == pytest.approx(0.1, rel=1e-4)
    assert ((moved - x) * g).sum() < 0
    assert attacks.l2_step(x, torch.zeros_like(g), 0.1).equal(x)
    far = x
    for _ in range(5):
        far = attacks.linf_step(far, g, x, alpha=0.1, eps=0.25)
    torch.testing.assert_close(far, x - 0.25 * g.sign())
    assert attacks.linf_step(x, g, x, 9.0, 9.0).aminmax() == (0, 1)


def test_attack_loss_and_success():
    logits, classes = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 1.0]]), torch.tensor([1, 1])
    assert attacks.attack_loss(logits, classes, targeted=True).tolist() == [-2, -1]
    assert attacks.attack_loss(logits, classes, targeted=False).tolist() == [2, 1]
    assert attacks.attack_succeeded(logits, classes, targeted=True).tolist() == [True, False]
    assert attacks.attack_succeeded(logits, classes, targeted=False).tolist() == [False, True]


def test_distances():
    a, b = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    b[0, 1, 2] = 4 / 255
    distances = attacks.distances(a, b)
    assert distances["linf_255"] == pytest.approx(4)
    assert distances["l2"] == pytest.approx(4 / 255)
    assert distances["psnr_db"] == pytest.approx(10 * np.log10(48 * (255 / 4) ** 2))
    assert attacks.distances(a, a)["psnr_db"] == float("inf")
