"""Maps of saliency against captum and against slow twins, on a small net in float64 and on the one that comes along."""

import numpy as np
import pytest
import torch
from torch import nn

from cvlab.data import photos
from cvlab.errors import ConfigError
from cvlab.models import pretrained
from cvlab.ops import saliency

attr = pytest.importorskip("captum.attr")


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)
    )
    return net.double().eval(), torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 4, 3])


def test_gradient_is_captums(small):
    net, x, y = small
    wanted = attr.Saliency(net).attribute(x.clone().requires_grad_(), target=y).amax(1)
    torch.testing.assert_close(saliency.vanilla_gradient(net, x, y), wanted, rtol=1e-9, atol=1e-15)


def test_integrated_gradients_are_captums_and_complete(small):
    net, x, y = small
    wanted = attr.IntegratedGradients(net).attribute(x, target=y, n_steps=20)
    found = saliency.integrated_gradients(net, x, y, steps=20)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)  # captum steps in float32
    whole = saliency.class_score(net(x), y) - saliency.class_score(net(torch.zeros_like(x)), y)
    many = saliency.integrated_gradients(net, x, y, steps=300)
    torch.testing.assert_close(many.sum((1, 2, 3)), whole, rtol=1e-3, atol=1e-3)


def test_gradcam_is_captums(small):
    net, x, y = small
    cam = attr.LayerGradCam(net, net[3]).attribute(x, target=y, relu_attributions=True)
    wanted = attr.LayerAttribution.interpolate(cam, (16, 16), "bilinear")[:, 0]
    torch.testing.assert_close(saliency.gradcam(net, x, y, layer=net[3]), wanted, rtol=1e-9, atol=1e-12)


def test_smoothgrad_is_the_mean_over_noise(small):
    net, x, y = small
    noises = torch.randn(3, *x.shape, dtype=torch.float64) * 0.1
    found = saliency.smoothgrad(net, x, y, noise=lambda k: noises[k], samples=3)
    mean = torch.stack([saliency.input_gradient(net, x + n, y) for n in noises]).mean(0)
    torch.testing.assert_close(found, mean.abs().amax(1))
    still = saliency.smoothgrad(net, x, y, noise=lambda k: torch.zeros_like(x), samples=2)
    torch.testing.assert_close(still, saliency.vanilla_gradient(net, x, y))


def test_a_gradient_is_the_slope(small):
    net, x, y = small
    slope = saliency.input_gradient(net, x, y, "loss")
    step = torch.zeros_like(x)
    step[:, 1, 7, 8] = 1e-6
    with torch.no_grad():
        change = saliency.class_loss(net(x + step), y) - saliency.class_loss(net(x - step), y)
    torch.testing.assert_close(slope[:, 1, 7, 8], change / 2e-6, rtol=1e-4, atol=1e-8)


def test_the_net_that_comes_along_agrees_with_captum():
    model = pretrained.build()
    view = photos.to_tensor(model.transform(photos.load(photos.find_images(["sample"])[0])))[None]
    y = torch.tensor([652])
    wanted = attr.Saliency(model.module).attribute(view.clone().requires_grad_(), target=y).amax(1)
    found = saliency.vanilla_gradient(model.module, view, y)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.max()
    both = [saliency.integrated_gradients(model.module, view, y, steps=8)]
    both.append(attr.IntegratedGradients(model.module).attribute(view, target=y, n_steps=8).float())
    assert (both[0] - both[1]).abs().max() <= 1e-5 * both[1].abs().max()
    layer = saliency.find_last_feature_layer(model.module, 224)
    assert saliency.gradcam(model.module, view, y, layer=layer).shape == (1, 224, 224)


def test_a_net_without_places_has_no_gradcam():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3 * 64, 2)

        def forward(self, x):
            return self.last(x.flatten(1))

    with pytest.raises(ConfigError, match="no feature maps"):
        saliency.find_last_feature_layer(Flat(), 8)


def test_heat_and_scaling():
    from cvlab.reports import images

    values = torch.zeros(10, 10)
    values[2, 3], values[5, 5] = 4.0, 1.0
    shown = images.scaled(values, 1.0)
    assert shown[2, 3] == 1
    assert shown[5, 5] == 0.25
    assert images.scaled(torch.zeros(4, 4)).max() == 0
    image = np.asarray(images.heat(torch.tensor([[0.0, 1.0]])))
    assert tuple(image[0, 0]) == images.HEAT[0]
    assert tuple(image[0, 1]) == images.HEAT[-1]
