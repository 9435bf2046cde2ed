"""Preprocessing of photos against timm's transform, and resize matrices against Pillow and torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cvlab import _compat
from cvlab.data import photos
from cvlab.ops.resample import EvalTransform, build_resize, resize_matrix


def smooth_image(width, height, seed=0):
    """Return a photo without sharp edges, so that no filter overshoots beyond [0, 1]."""
    rough = np.random.default_rng(seed).integers(60, 190, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


SIZES = [(500, 375), (333, 500), (224, 224), (256, 256), (97, 61), (30, 400), (1000, 231), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_eval_transform_matches_timm(size, name):
    photo = smooth_image(*size)
    transform = _compat.timm().data.create_transform(
        (3, 224, 224), interpolation=name, crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1)
    )
    actual = photos.to_tensor(EvalTransform(224, 256, name)(photo))
    assert (actual - transform(photo)).abs().max() <= 2.01 / 255  # Pillow chooses which side to resize first


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "transform", [EvalTransform(224, 256), EvalTransform(224, 256, "bilinear"), EvalTransform(64, 64, squash=True)]
)
def test_resize_matches_pillow(size, transform):
    photo = smooth_image(*size)
    resize = build_resize(transform, *size)
    actual = resize(resize.crop(photos.to_tensor(photo)))
    assert (actual - photos.to_tensor(transform(photo))).abs().max() <= 1.2 / 255  # rounded twice


@pytest.mark.parametrize(("count", "size"), [(37, 11), (11, 37), (20, 20)])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_resize_matrix_matches_torch(count, size, name):
    rows, first, last = resize_matrix(count, 0, count, size, name)
    x = torch.randn(1, 1, count, 8)
    expected = F.interpolate(x, size=(size, 8), mode=name, antialias=True, align_corners=False)[0, 0]
    assert (first, last) == (0, count)
    torch.testing.assert_close(rows @ x[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_an_image_of_the_right_size_is_unchanged():
    photo = smooth_image(224, 224)
    assert EvalTransform(224, 224)(photo).tobytes() == photo.tobytes()
    resize = build_resize(EvalTransform(224, 224), 224, 224)
    x = photos.to_tensor(photo)
    assert torch.equal(resize(resize.crop(x)), x)
    assert resize.scale == 1
