"""Saliency maps compared with captum and with slow references."""

import pytest
import torch
from torch import nn

from cvlab.data import photo_paths, photos
from cvlab.errors import ConfigError
from cvlab.models import pretrained
from cvlab.ops import saliency

attr = pytest.importorskip("captum.attr")


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)
    )
    return model.double().eval(), torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 4, 3])


def test_gradient_equals_captum(small_model):
    model, x, classes = small_model
    expected = attr.Saliency(model).attribute(x.clone().requires_grad_(), target=classes).amax(1)
    torch.testing.assert_close(saliency.vanilla_gradient(model, x, classes), expected, rtol=1e-9, atol=1e-15)


def test_integrated_gradients_equal_captum_and_are_complete(small_model):
    model, x, classes = small_model
    expected = attr.IntegratedGradients(model).attribute(x, target=classes, n_steps=20)
    values = saliency.integrated_gradients(model, x, classes, steps=20)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-9)  # captum steps in float32
    whole = saliency.class_score(model(x), classes) - saliency.class_score(model(torch.zeros_like(x)), classes)
    many = saliency.integrated_gradients(model, x, classes, steps=300)
    torch.testing.assert_close(many.sum((1, 2, 3)), whole, rtol=1e-3, atol=1e-3)


def test_gradcam_equals_captum(small_model):
    model, x, classes = small_model
    cam = attr.LayerGradCam(model, model[3]).attribute(x, target=classes, relu_attributions=True)
    expected = attr.LayerAttribution.interpolate(cam, (16, 16), "bilinear")[:, 0]
    torch.testing.assert_close(saliency.gradcam(model, x, classes, layer=model[3]), expected, rtol=1e-9, atol=1e-12)


def test_smoothgrad_is_the_mean_over_noise(small_model):
    model, x, classes = small_model
    noises = torch.randn(3, *x.shape, dtype=torch.float64) * 0.1
    values = saliency.smoothgrad(model, x, classes, noise=lambda k: noises[k], samples=3)
    mean = torch.stack([saliency.input_gradient(model, x + n, classes) for n in noises]).mean(0)
    torch.testing.assert_close(values, mean.abs().amax(1))
    still = saliency.smoothgrad(model, x, classes, noise=lambda k: torch.zeros_like(x), samples=2)
    torch.testing.assert_close(still, saliency.vanilla_gradient(model, x, classes))


def test_gradient_equals_finite_difference(small_model):
    model, x, classes = small_model
    slope = saliency.input_gradient(model, x, classes, "loss")
    step = torch.zeros_like(x)
    step[:, 1, 7, 8] = 1e-6
    with torch.no_grad():
        change = saliency.class_loss(model(x + step), classes) - saliency.class_loss(model(x - step), classes)
    torch.testing.assert_close(slope[:, 1, 7, 8], change / 2e-6, rtol=1e-4, atol=1e-8)


def test_bundled_model_agrees_with_captum():
    model = pretrained.build()
    view = photos.to_tensor(model.transform(photos.load(photo_paths.find_images(["sample"])[0])))[None]
    classes = torch.tensor([652])
    expected = attr.Saliency(model.module).attribute(view.clone().requires_grad_(), target=classes).amax(1)
    values = saliency.vanilla_gradient(model.module, view, classes)
    assert (values - expected).abs().max() <= 1e-5 * expected.max()
    both = [saliency.integrated_gradients(model.module, view, classes, steps=8)]
    both.append(attr.IntegratedGradients(model.module).attribute(view, target=classes, n_steps=8).float())
    assert (both[0] - both[1]).abs().max() <= 1e-5 * both[1].abs().max()
    layer = saliency.find_last_feature_layer(model.module, 224)
    assert saliency.gradcam(model.module, view, classes, layer=layer).shape == (1, 224, 224)


def test_model_without_feature_maps_has_no_gradcam():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3 * 64, 2)

        def forward(self, x):
            return self.last(x.flatten(1))

    with pytest.raises(ConfigError, match="no feature maps"):
        saliency.find_last_feature_layer(Flat(), 8)
