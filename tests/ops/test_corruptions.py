"""Corruptions: their strengths, and a blur that agrees with Pillow's and with a simple reference."""

import math

import numpy as np
import pytest
import torch

from cvlab.data import rng
from cvlab.ops import corruptions


def normal(shape):
    return rng.normal(0, 0, shape, "test")


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 24, 20, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_higher_severity_changes_more(images, name):
    for side in (1, 5):  # small images, and large ones with other strengths
        photos = images.repeat_interleave(side, 1).repeat_interleave(side, 2)
        changes = []
        for severity in corruptions.SEVERITIES:
            corrupted = corruptions.apply(name, photos, severity, normal)
            assert corrupted.dtype == torch.uint8
            assert corrupted.shape == photos.shape
            changes.append((corrupted.float() - photos).abs().mean().item())
        assert changes == sorted(changes)
        assert changes[0] > 0


def test_noise_has_its_standard_deviation():
    gray = torch.full((2, 60, 60, 3), 128, dtype=torch.uint8)
    noisy = corruptions.apply("noise", gray, 3, normal).float()
    assert noisy.std().item() == pytest.approx(255 * 0.08, rel=0.03)
    assert noisy.mean().item() == pytest.approx(128, abs=1)


def test_contrast_keeps_the_mean(images):
    flat = corruptions.apply("contrast", images, 2, normal).float()
    torch.testing.assert_close(flat.mean((1, 2)), images.float().mean((1, 2)), atol=0.3, rtol=0)
    assert (flat.std((1, 2)) / images.float().std((1, 2))).mean().item() == pytest.approx(0.5, abs=0.01)


def test_blur_equals_a_simple_reference(images):
    blurred = corruptions.apply("blur", images[:1], 5, normal)[0]
    sigma, radius = 1.0, 4
    weights = np.array([math.exp(-(d**2) / (2 * sigma**2)) for d in range(-radius, radius + 1)])
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(images[0].numpy().astype(float), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    for row, column in ((0, 0), (11, 7), (23, 19)):
        window = padded[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
        expected = (window * kernel[:, :, None]).sum((0, 1))
        assert np.abs(blurred[row, column].numpy() - expected).max() <= 0.51
    flat = torch.full((1, 9, 9, 1), 77, dtype=torch.uint8)
    assert corruptions.apply("blur", flat, 5, normal).equal(flat)


def test_gray_images_are_compressed_too():
    gray = torch.randint(0, 256, (2, 16, 16, 1), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert corruptions.apply("jpeg", gray, 5, normal).shape == gray.shape
