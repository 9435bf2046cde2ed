"""Views of photos: boxes follow the pixels, and random views are a pure function of their seed."""

import pytest
import torch
from PIL import Image

from cvlab.data import photos, rng
from cvlab.experiments.detection import config as detection_config
from cvlab.experiments.detection.data import augment
from cvlab.ops import boxes, style


def random_boxes(count, seed=0, span=100.0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * span
    return torch.cat([low, low + 5 + 40 * torch.rand(count, 2, generator=generator, dtype=torch.float64)], 1)


@pytest.mark.parametrize("number", range(6))
def test_the_inverse_transform_restores_boxes(number):
    transform = augment.random_view(300, 200, 128, detection_config.AugmentConfig(), 0, 5, number)
    boxes_xyxy = random_boxes(9)
    torch.testing.assert_close(transform.inverse_transform_boxes(transform.transform_boxes(boxes_xyxy)), boxes_xyxy)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (500, 90)])
@pytest.mark.parametrize("number", range(5))
def test_rendered_objects_lie_in_their_boxes(size, number):
    """A white rectangle on black, drawn by Pillow, lies in the view where its box is."""
    width, height = size
    photo = Image.new("RGB", size)
    box = (width * 0.3, height * 0.35, width * 0.6, height * 0.7)
    photo.paste((255, 255, 255), tuple(round(v) for v in box))
    box = torch.tensor([[float(round(v)) for v in box]])
    transform = augment.random_view(width, height, 160, detection_config.AugmentConfig(), 1, 2, number)
    visible, indices = transform.visible_boxes(box)
    positions = (torch.tensor(list(transform.render(photo).convert("L").tobytes())).view(160, 160) > 200).nonzero()
    if not len(indices):
        assert len(positions) < 0.4 * float(boxes.area(transform.transform_boxes(box)))
        return
    corners = torch.cat([positions.amin(0).flip(0), positions.amax(0).flip(0) + 1]).float()
    assert float((corners - visible[0]).abs().max()) < 2.0


def test_the_whole_photo_keeps_its_aspect_ratio():
    transform = augment.whole_photo(400, 100, 200)
    assert transform.transform_boxes(torch.tensor([[0.0, 0, 400, 100]])).tolist() == [[0, 75, 200, 125]]
    assert transform.render(Image.new("RGB", (400, 100), "red")).getpixel((0, 0)) == augment.GRAY


def test_views_are_a_pure_function_of_seed_photo_and_number():
    config = detection_config.AugmentConfig()
    view_transform = augment.random_view(300, 200, 128, config, 0, 5, 1)
    assert view_transform == augment.random_view(300, 200, 128, config, 0, 5, 1)
    others = [augment.random_view(300, 200, 128, config, *key) for key in ((1, 5, 1), (0, 6, 1), (0, 5, 2))]
    assert all(view_transform != other for other in others)
    image = photos.to_image(torch.rand(3, 8, 8))
    assert augment.color_jitter(image, config, 0, 1, 2) == augment.color_jitter(image, config, 0, 1, 2)
    assert augment.color_jitter(image, config, 0, 1, 2) != augment.color_jitter(image, config, 0, 1, 3)


@pytest.mark.parametrize("strengths", [(0.9, 0, 0), (0, 0.9, 0), (0, 0, 0.9), (0.5, 0.3, 0.4)])
def test_color_jitter_equals_three_steps_in_floating_point(strengths):
    saturation, contrast, brightness = strengths
    config = detection_config.AugmentConfig(saturation=saturation, contrast=contrast, brightness=brightness)
    view = photos.to_image(torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2)
    for number in range(4):
        u = (rng.uniform(5, number, 3 * 16 + 8 + torch.arange(3), "views") * 2 - 1).tolist()
        pixels = photos.to_tensor(view)
        gray = style.luminance(pixels)
        pixels = gray + (pixels - gray) * (1 + saturation * u[0])
        pixels = gray.mean() + (pixels - gray.mean()) * (1 + contrast * u[1])
        pixels = (pixels + gray.mean() * brightness * u[2]).clamp(0, 1)
        jittered = photos.to_tensor(augment.color_jitter(view, config, 5, 3, number))
        assert (jittered - pixels).abs().max() <= 0.51 / 255


def test_barely_visible_boxes_are_dropped():
    transform = augment.ViewTransform(100, 1.0, 1.0, -50.0, 0.0)
    boxes_xyxy = torch.tensor([[0.0, 0, 60, 40], [40.0, 0, 70, 40], [60.0, 10, 60.5, 11]])
    visible, indices = transform.visible_boxes(boxes_xyxy)
    assert indices.tolist() == [1]
    assert visible.tolist() == [[0, 0, 20, 40]]
