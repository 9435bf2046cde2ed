"""Values and gradients of sampling and padding against those of torch."""

import pytest
import torch
import torch.nn.functional as F

from cvlab.ops import sampling


def value_and_gradient(function, images, upstream_seed=1):
    images = images.clone().requires_grad_()
    result = function(images)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(upstream_seed), dtype=result.dtype)
    return result.detach(), torch.autograd.grad((result * upstream).sum(), images)[0]


@pytest.mark.parametrize(
    ("mode", "padding_mode"), [("bilinear", "zeros"), ("bilinear", "reflection"), ("bicubic", "zeros")]
)
@pytest.mark.parametrize("size", [(7, 9), (1, 4)])
def test_sample_by_index_matches_torch(mode, padding_mode, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    grid = 8 * torch.rand(2, 11, 13, 2, generator=generator, dtype=torch.float64) - 4  # reflected several times
    grid[0, 0, :3] = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    expected = value_and_gradient(
        lambda x: F.grid_sample(x, grid, mode=mode, padding_mode=padding_mode, align_corners=False), images
    )
    actual = value_and_gradient(lambda x: sampling.sample_by_index(x, grid, mode, padding_mode), images)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    dispatched = value_and_gradient(lambda x: sampling.grid_sample(x, grid, mode, padding_mode), images)
    torch.testing.assert_close(dispatched, expected, atol=0, rtol=0)


@pytest.mark.parametrize("sides", [(2, 3, 1, 4), (0, 5, 0, 0), (0, 0, 0, 0), (9, 9, 9, 9)])
def test_repeated_edges_match_torch(sides):
    images = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = value_and_gradient(lambda x: F.pad(x, sides, mode="replicate"), images)
    actual = value_and_gradient(lambda x: sampling.pad_edges(x, *sides), images)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(8, 10), (7, 13), (4, 5)])
def test_upsampling_by_matrices_matches_torch(size):
    images = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = value_and_gradient(lambda x: F.interpolate(x, size=size, mode="bilinear", align_corners=False), images)
    actual = value_and_gradient(lambda x: sampling.upsample_by_matrices(x, size), images)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)  # the matrices are float32
    dispatched = value_and_gradient(lambda x: sampling.upsample_bilinear(x, size), images)
    torch.testing.assert_close(dispatched, expected, atol=0, rtol=0)
