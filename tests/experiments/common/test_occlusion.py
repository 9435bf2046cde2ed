"""Explanations by occlusion: artificial cases in which only known pixels have an effect."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.experiments.common import occlusion


def corner_brightness(images):
    """Return the mean of the upper left 20 x 20 pixels of each photo, (N,)."""
    return torch.tensor([float(np.asarray(image)[:20, :20].mean()) for image in images])


@pytest.mark.parametrize("size", [(100, 60), (1024, 512)])
def test_only_the_pixels_that_have_an_effect_are_highlighted(size):
    photo = Image.new("RGB", size, "white")
    values = occlusion.occlusion_map(corner_brightness, photo, 0.1, 7, lambda note, done: None)
    assert max(values.shape) <= occlusion.MAX_MAP_PX
    assert values.shape[1] / values.shape[0] == pytest.approx(size[0] / size[1])
    factor = values.shape[1] / size[0]
    reach = round((20 * factor) + 0.1 * values.shape[1])
    assert float(values[: round(10 * factor), : round(10 * factor)].min()) > 0
    assert not values[reach:].any()
    assert not values[:, reach:].any()


def test_squares_reach_from_edge_to_edge():
    for length, side_px in ((10, 3), (7, 7), (5, 9), (1, 1), (100, 7)):
        starts = occlusion._starts(length, side_px)
        assert starts[0] == 0
        assert starts[-1] == max(0, length - side_px)
        assert all(b - a <= max(1, (side_px + 1) // 2) for a, b in itertools.pairwise(starts))
