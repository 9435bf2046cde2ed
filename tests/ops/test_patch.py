"""Patches placed in tensors end up where Pillow pastes them."""

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.ops import patch

SIZE = 64


@pytest.mark.parametrize(
    "placement",
    [
        patch.Placement(0.5, 0.0, 0.5, 0.5),
        patch.Placement(0.5, 30.0, 0.3, 0.6),
        patch.Placement(0.25, -75.0, 0.75, 0.2),
    ],
)
def test_a_patch_is_placed_where_pillow_pastes_it(placement):
    pattern = photos.load(photo_paths.find_images(["sample"])[0]).crop((100, 40, 400, 340)).resize((32, 32))
    mask = patch.disk(32)
    image = Image.new("RGB", (SIZE, SIZE), (40, 90, 140))
    gray = Image.fromarray(mask.mul(255).round().byte().numpy())
    expected = photos.to_tensor(patch.paste(image, pattern, gray, placement))
    actual = patch.place(photos.to_tensor(image)[None], photos.to_tensor(pattern), mask, [placement])[0]
    assert (actual - expected).abs().mean() <= 0.016  # pasted at a whole pixel
    moved = patch.Placement(placement.side, placement.degrees, placement.x + 4 / SIZE, placement.y)
    turned = patch.Placement(placement.side, placement.degrees + 40, placement.x, placement.y)
    for other in (moved, turned):
        wrong = patch.place(photos.to_tensor(image)[None], photos.to_tensor(pattern), mask, [other])[0]
        assert (wrong - expected).abs().mean() >= 2 * (actual - expected).abs().mean()


def test_a_fine_texture_is_downsampled_as_by_pillow():
    texture = photos.to_image(torch.rand(3, 112, 112, generator=torch.Generator().manual_seed(0)))
    mask, placement = patch.disk(112), patch.Placement(0.3, 20.0, 0.4, 0.55)
    image = Image.new("RGB", (224, 224), (40, 90, 140))
    gray = Image.fromarray(mask.mul(255).round().byte().numpy())
    before = photos.to_tensor(image)
    expected = photos.to_tensor(patch.paste(image, texture, gray, placement))
    is_covered = (expected != before).any(0)
    actual = patch.place(before[None], photos.to_tensor(texture), mask, [placement])[0]
    difference = (actual - expected)[:, is_covered].abs().mean()
    assert difference < 0.06  # 0.11 if it is sampled without a filter


def test_placements_are_inside_and_the_patch_has_a_gradient():
    numbers = np.random.default_rng(0).random((50, 4)).tolist()
    for row in numbers:
        placement = patch.random_placement(row, 0.3, 0.5, 30.0)
        assert 0.3 <= placement.side <= 0.5
        assert abs(placement.degrees) <= 30
        assert placement.side / 2 <= min(placement.x, placement.y)
        assert max(placement.x, placement.y) <= 1 - placement.side / 2
    pixels = torch.full((3, 16, 16), 0.5, requires_grad=True)
    placements = [patch.random_placement(row, 0.3, 0.5, 30.0) for row in numbers[:2]]
    patch.place(torch.zeros(2, 3, SIZE, SIZE), pixels, patch.disk(16), placements).sum().backward()
    assert (pixels.grad[:, 4:12, 4:12] > 0).all()
    assert (pixels.grad[:, 0, 0] == 0).all()
