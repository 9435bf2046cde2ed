"""The Fourier parametrization and the random transformations of class visualization."""

import math

import pytest
import torch

from cvlab.ops import visualize


def half(count):
    return torch.full((count,), 0.5)


def test_spectrum_to_images_inverts_images_to_spectrum():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16) * 0.8 + 0.1
    spectrum = visualize.images_to_spectrum(images)
    assert spectrum.shape == visualize.spectrum_shape(2, 16)
    torch.testing.assert_close(visualize.spectrum_to_images(spectrum, 16), images, rtol=1e-4, atol=1e-4)


def test_band_removes_fine_detail():
    torch.manual_seed(0)
    spectrum = torch.randn(visualize.spectrum_shape(1, 32))
    values = [
        visualize.spectrum_to_images(spectrum, 32, band).diff(dim=3).abs().mean().item() for band in (0.1, 0.4, 1.0)
    ]
    assert values[0] < 0.5 * values[1] < values[2]


def test_transformations_of_zero_strength_change_nothing():
    x = torch.rand(2, 3, 12, 12)
    none = {"rotate_degrees": 0.0, "zoom": 0.0, "shift": 0.0}
    torch.testing.assert_close(visualize.random_affine(x, torch.rand, **none), x)
    torch.testing.assert_close(visualize.random_affine(x, half, rotate_degrees=90, zoom=0.5, shift=0.5), x)
    assert visualize.random_roll(x, half, 3).equal(x)
    torch.testing.assert_close(visualize.color_jitter(x, half, gray=0.0, contrast=0.0), x)


def test_transformations_of_full_strength():
    x = torch.rand(1, 3, 12, 12)
    rotated = visualize.random_affine(
        x, lambda n: torch.tensor([1.0, 0.5, 0.5, 0.5]), rotate_degrees=90, zoom=0, shift=0
    )
    rotations = (x.rot90(1, (2, 3)), x.rot90(-1, (2, 3)))
    assert any(torch.allclose(rotated, rotation, atol=1e-4) for rotation in rotations)
    low = visualize.random_roll(x, torch.zeros, 2)
    assert low.equal(torch.roll(x, (-2, -2), (2, 3)))
    gray = visualize.color_jitter(x, torch.ones, gray=1.0, contrast=0.0)
    torch.testing.assert_close(gray, x.mean(1, keepdim=True).expand_as(x))


def test_blur_equals_torchvision():
    from cvlab import _compat

    x = torch.rand(1, 3, 30, 30)
    expected = _compat.torchvision().transforms.functional.gaussian_blur(x, 17, 2.0)
    torch.testing.assert_close(
        visualize.gaussian_blur(x, 2.0)[..., 10:20, 10:20], expected[..., 10:20, 10:20], atol=1e-4, rtol=1e-3
    )
    flat = torch.full((1, 3, 9, 9), 0.3)
    torch.testing.assert_close(visualize.gaussian_blur(flat, 1.0), flat)


def test_padding_surrounds_the_moved_image():
    x = torch.rand(2, 3, 12, 12)
    colors = torch.tensor([[0.1, 0.5, 0.9], [1.0, 0.0, 0.0]])
    none = {"rotate_degrees": 0.0, "zoom": 0.0}
    torch.testing.assert_close(visualize.random_affine(x, half, shift=0.5, padding=colors, **none), x)
    # shift by half the image, up and left
    shifted = visualize.random_affine(x, torch.zeros, shift=0.5, padding=colors, **none)
    torch.testing.assert_close(shifted[..., 6:, 6:], x[..., :6, :6])
    torch.testing.assert_close(shifted[..., :6], colors[:, :, None, None].expand(2, 3, 12, 6))


def test_saturation_loss_equals_the_slow_reference():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    total = 0.0
    for image in images:
        for i in range(0, 6, 3):
            for j in range(0, 6, 3):
                red, green, blue = image[:, i : i + 3, j : j + 3].mean((1, 2)).tolist()
                luma = 0.299 * red + 0.587 * green + 0.114 * blue
                distance = math.hypot((blue - luma) / 1.772, (red - luma) / 1.402)
                total += max(0.0, 1 - distance / 0.2) ** 2 / 4
    assert float(visualize.saturation_loss(images, 0.2, 3)) == pytest.approx(total, abs=1e-4)
    gray = torch.full((3, 3, 8, 8), 0.4, requires_grad=True)
    loss = visualize.saturation_loss(gray, 0.1, 16)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(3, rel=1e-2)
    assert gray.grad.isfinite().all()
