"""Losses of style transfer compared with slow references; image similarity."""

import math

import numpy as np
import pytest
import torch

from cvlab.ops import style


def slow_gram(features, mask):
    c, h, w = features.shape
    total = torch.zeros(c, c, dtype=features.dtype)
    for i in range(h):
        for j in range(w):
            total += mask[i, j] * torch.outer(features[:, i, j], features[:, i, j])
    return total / (c * mask.sum())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (7, 2, 9)])
class TestLosses:
    def test_gram_is_the_mean_of_outer_products(self, shape):
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(style.gram_matrix(x), slow_gram(x, torch.ones(shape[1:]).double()))
        mask = torch.rand(shape[1:], dtype=torch.float64)
        torch.testing.assert_close(style.gram_matrix(x, mask), slow_gram(x, mask))

    def test_gradients(self, shape):
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = torch.randn(shape, dtype=torch.float64)
        mask = torch.rand(shape[1:], dtype=torch.float64)
        gram = style.gram_matrix(expected)
        assert torch.autograd.gradcheck(lambda t: style.content_loss(t, expected), x)
        assert torch.autograd.gradcheck(lambda t: style.style_loss(t, gram), x)
        assert torch.autograd.gradcheck(lambda t: style.style_loss(t, gram, mask), x)
        assert torch.autograd.gradcheck(style.tv_loss, x)

    def test_values(self, shape):
        torch.manual_seed(0)
        x, y = torch.randn(2, *shape, dtype=torch.float64)
        pairs = zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
        assert float(style.content_loss(x, y)) == pytest.approx(sum((a - b) ** 2 for a, b in pairs))
        c, h, w = shape
        across = sum(float(x[k, i, j + 1] - x[k, i, j]) ** 2 for k in range(c) for i in range(h) for j in range(w - 1))
        down = sum(float(x[k, i + 1, j] - x[k, i, j]) ** 2 for k in range(c) for i in range(h - 1) for j in range(w))
        assert float(style.tv_loss(x)) == pytest.approx(across + down)


def test_gram_matrix_ignores_the_order_of_positions():
    x = torch.randn(4, 6, 6)
    shuffled = x.flatten(1)[:, torch.randperm(36)].view(4, 6, 6)
    torch.testing.assert_close(style.gram_matrix(x), style.gram_matrix(shuffled))
    assert not torch.allclose(style.gram_matrix(x), style.gram_matrix(x.flip(0)))


def slow_rgb(luminance_map, chroma_map):
    """Compute each pixel by the equations of BT.601, with bilinear interpolation of the chroma of half the size."""
    height, width = luminance_map.shape[1:]
    image = np.empty((3, height, width))
    for i, j in np.ndindex(height, width):
        y, x = (
            min(max((k + 0.5) / 2 - 0.5, 0), side - 1) for k, side in zip((i, j), chroma_map.shape[1:], strict=True)
        )
        top, left = int(y), int(x)
        bottom, right = min(top + 1, chroma_map.shape[1] - 1), min(left + 1, chroma_map.shape[2] - 1)
        upper = (1 - x + left) * chroma_map[:, top, left] + (x - left) * chroma_map[:, top, right]
        lower = (1 - x + left) * chroma_map[:, bottom, left] + (x - left) * chroma_map[:, bottom, right]
        blue, red = (1 - y + top) * upper + (y - top) * lower
        luma = luminance_map[0, i, j]
        image[:, i, j] = luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue
    return image


def test_ycbcr_to_rgb_equals_the_slow_reference():
    generator = np.random.default_rng(0)
    luma, colors = generator.random((1, 6, 8)), generator.random((2, 3, 4)) - 0.5
    image = style.ycbcr_to_rgb(torch.tensor(luma), torch.tensor(colors))
    np.testing.assert_allclose(image.numpy(), slow_rgb(luma, colors), atol=1e-5)


def test_luminance_and_chroma_are_inverted():
    image = torch.rand(3, 5, 7, dtype=torch.float64)
    luma, colors = style.luminance(image), style.chroma(image)
    assert float(colors.abs().max()) <= 0.5
    torch.testing.assert_close(style.ycbcr_to_rgb(luma, colors), image)


def test_ssim_equals_numpy():
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 11, 11, dtype=torch.float64)
    line = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    a, b = x[0].numpy(), y[0].numpy()
    ma, mb = (window * a).sum(), (window * b).sum()
    va, vb, cab = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2, (window * a * b).sum() - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * cab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert style.ssim(x, y) == pytest.approx(expected)


def test_psnr():
    x = torch.zeros(3, 4, 4)
    assert style.psnr_db(x, x + 0.1) == pytest.approx(20.0, abs=1e-5)
    assert style.psnr_db(x, x) == math.inf


def test_transfer_color_keeps_the_luminance():
    torch.manual_seed(0)
    brightness, colors = 0.4 + 0.2 * torch.rand(1, 5, 5), 0.4 + 0.2 * torch.rand(3, 5, 5)
    torch.testing.assert_close(style.luminance(style.transfer_color(brightness, colors)), brightness)
    recolored = style.transfer_color(style.luminance(colors), colors)
    torch.testing.assert_close(recolored, colors)
