"""JPEG compression of tensors against Pillow's, and the photo changes of robust attacks on tensors against images."""

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.ops import jpeg, photo_changes


@pytest.fixture(scope="module")
def sample():
    return photos.load(photo_paths.find_images(["sample"])[0])


def levels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("size", [(160, 96), (123, 77), (16, 9)])
@pytest.mark.parametrize(("quality", "equal"), [(40, 0.9), (75, 0.85), (95, 0.65)])
def test_jpeg_agrees_with_pillow(sample, size, quality, equal):
    image = sample.resize(size, Image.Resampling.BICUBIC)
    expected = levels(jpeg.compress(image, quality))
    actual = jpeg.differentiable_jpeg(photos.to_tensor(image)[None], quality)[0]
    difference = np.abs(levels(photos.to_image(actual)) - expected)
    assert (difference == 0).mean() >= equal
    assert difference.mean() <= 0.12 * np.abs(levels(image) - expected).mean()
    assert difference.max() <= 20  # where a coefficient is rounded to another level


def test_the_gradient_passes_through_the_rounding(sample):
    image = photos.to_tensor(sample.resize((45, 40)))[None] * 0.5 + 0.2
    image.requires_grad_()
    luma = torch.tensor(jpeg.YCC_FROM_RGB[0]).view(3, 1, 1)
    upstream = torch.rand(40, 45)
    (jpeg.differentiable_jpeg(image, 75) * luma * upstream).sum().backward()
    torch.testing.assert_close(image.grad[0], luma * upstream, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "uniform", "variant"),
    [
        (photo_changes.build("resize"), (0.3, 0.3, 0.0), 0),
        (photo_changes.build("resize"), (0.3, 0.3, 0.5), 1),
        (photo_changes.build("crop"), (0.5, 0.5, 0.3), 2),
        (photo_changes.build("crop"), (0.0, 1.0, 0.3), 1),
    ],
)
def test_changes_of_tensors_match_those_of_images(sample, change, uniform, variant):
    image = sample.resize((91, 64)).point(lambda level: 60 + level // 3)  # filters overshoot [0, 1] nowhere
    actual = change(photos.to_tensor(image), uniform)
    expected = change.variants(image)[variant]
    assert actual.shape[1:] == (expected.height, expected.width)
    assert np.abs(levels(photos.to_image(actual)) - levels(expected)).max() <= 1
