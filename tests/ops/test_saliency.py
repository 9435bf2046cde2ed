"""Saliency maps compared with captum and with slow references."""

import pytest
import torch
from torch import nn

from cvlab.data import photo_paths, photos
from cvlab.errors import ConfigError
from cvlab.models import pretrained, zoo
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
    difference = saliency.class_score(model(x), classes) - saliency.class_score(model(torch.zeros_like(x)), classes)
    precise = saliency.integrated_gradients(model, x, classes, steps=300)
    torch.testing.assert_close(precise.sum((1, 2, 3)), difference, rtol=1e-3, atol=1e-3)


def test_gradcam_equals_captum(small_model):
    model, x, classes = small_model
    cam = attr.LayerGradCam(model, model[3]).attribute(x, target=classes, relu_attributions=True)
    expected = attr.LayerAttribution.interpolate(cam, (16, 16), "bilinear")[:, 0]
    torch.testing.assert_close(
        saliency.gradcam(model, x, classes, layer=saliency.FeatureLayer(model[3])), expected, rtol=1e-9, atol=1e-12
    )


def test_smoothgrad_is_the_mean_over_noise(small_model):
    model, x, classes = small_model
    noises = torch.randn(3, *x.shape, dtype=torch.float64) * 0.1
    values = saliency.smoothgrad(model, x, classes, noise=lambda k: noises[k], samples=3)
    mean = torch.stack([saliency.input_gradient(model, x + n, classes) for n in noises]).mean(0)
    torch.testing.assert_close(values, mean.abs().amax(1))
    without_noise = saliency.smoothgrad(model, x, classes, noise=lambda k: torch.zeros_like(x), samples=2)
    torch.testing.assert_close(without_noise, saliency.vanilla_gradient(model, x, classes))


def test_gradient_equals_finite_difference(small_model):
    model, x, classes = small_model
    gradient = saliency.input_gradient(model, x, classes, "loss")
    step = torch.zeros_like(x)
    step[:, 1, 7, 8] = 1e-6
    with torch.no_grad():
        change = saliency.class_loss(model(x + step), classes) - saliency.class_loss(model(x - step), classes)
    torch.testing.assert_close(gradient[:, 1, 7, 8], change / 2e-6, rtol=1e-4, atol=1e-8)


def test_bundled_model_agrees_with_captum():
    model = pretrained.build()
    view = photos.to_tensor(model.transform(photos.load(photo_paths.find_images(["sample"])[0])))[None]
    classes = torch.tensor([652])
    expected = attr.Saliency(model.module).attribute(view.clone().requires_grad_(), target=classes).amax(1)
    values = saliency.vanilla_gradient(model.module, view, classes)
    assert (values - expected).abs().max() <= 1e-5 * expected.max()
    attributions = [saliency.integrated_gradients(model.module, view, classes, steps=8)]
    attributions.append(attr.IntegratedGradients(model.module).attribute(view, target=classes, n_steps=8).float())
    assert (attributions[0] - attributions[1]).abs().max() <= 1e-5 * attributions[1].abs().max()
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


LAYERS = {  # model -> the layer before its pooling, the axes of its output
    "timm:resnet18": ("layer4", "NCHW"),
    "timm:vit_tiny_patch16_224": ("blocks.10", "tokens"),
    "timm:deit_tiny_patch16_224": ("blocks.10", "tokens"),
    "timm:deit_tiny_distilled_patch16_224": ("blocks.10", "tokens"),
    "timm:swin_tiny_patch4_window7_224": ("norm", "NHWC"),
    "timm:cait_xxs24_224": ("blocks", "tokens"),
    "timm:mixer_s32_224": ("norm", "tokens"),
    "timm:xcit_nano_12_p16_224": ("cls_attn_blocks.0", "tokens"),
    "timm:convnext_atto": ("norm_pre", "NCHW"),
    "timm:mobilenetv3_small_050": ("blocks", "NCHW"),
    "torchvision:mobilenet_v3_small": ("features", "NCHW"),
    "torchvision:googlenet": ("inception5b", "NCHW"),
    "torchvision:inception_v3": ("Mixed_7c", "NCHW"),
    "torchvision:densenet121": ("features", "NCHW"),
    "torchvision:squeezenet1_1": ("classifier.2", "NCHW"),
    "torchvision:shufflenet_v2_x0_5": ("conv5", "NCHW"),
}


def random_model(name):
    """Return a model with random weights, also in a classifier that is initialized to zeros, and its image size."""
    library, _, model_name = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        model = zoo.build_timm(model_name)
    else:
        extra = {"init_weights": False} if model_name in ("googlenet", "inception_v3") else {}
        model = zoo.build_torchvision(model_name, **extra)
    for parameter in list(model.parameters())[-2:]:
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False), 299 if "inception" in name else 224


class AsMaps(nn.Module):
    """A layer whose feature maps pass through an identity as (N, C, h, w), which captum can hook."""

    def __init__(self, layer, axes):
        super().__init__()
        self.layer, self.axes, self.maps = layer, axes, nn.Identity()

    def forward(self, x, *args, **options):
        output = self.layer(x, *args, **options)
        if self.axes == "NCHW":
            return self.maps(output)
        if self.axes == "NHWC":
            return self.maps(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        side = int(output.shape[1] ** 0.5)
        prefix, patches = output.split([output.shape[1] - side**2, side**2], 1)
        maps = patches.reshape(len(output), side, side, -1).permute(0, 3, 1, 2)
        return torch.cat([prefix, self.maps(maps).flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcam_takes_the_layer_before_the_pooling(name):
    model, size_px = random_model(name)
    layer_name, axes = LAYERS[name]
    expected_layer = model.get_submodule(layer_name)
    layer = saliency.find_last_feature_layer(model, size_px)
    assert {module: key for key, module in model.named_modules()}[layer.module] == layer_name
    assert layer.axes == axes
    images, classes = torch.rand(3, 3, size_px, size_px), torch.tensor([1, 3, 5])
    values = saliency.gradcam(model, images, classes, layer=layer)
    parent, _, key = layer_name.rpartition(".")
    wrapped = AsMaps(expected_layer, axes)
    setattr(model.get_submodule(parent), key, wrapped)
    cam = attr.LayerGradCam(model, wrapped.maps).attribute(images, target=classes, relu_attributions=True)
    expected = attr.LayerAttribution.interpolate(cam, (size_px, size_px), "bilinear")[:, 0].detach()
    assert values.max() > 0
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("name", ["timm:tnt_s_legacy_patch16_224", "timm:crossvit_9_240"])
def test_a_model_without_a_unique_last_map_is_rejected_with_a_one_line_error(name):
    model, _ = random_model(name)
    with pytest.raises(ConfigError, match=r"method=gradcam: .*; choose another method") as error:
        saliency.find_last_feature_layer(model, 240 if "crossvit" in name else 224)
    assert "\n" not in str(error.value)


class Branches(nn.Module):
    """Two branches, concatenated and activated in place by a module that is called twice, followed by `head`."""

    def __init__(self, head):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(3, 6, 3, 2)
        self.relu, self.head = nn.ReLU(inplace=True), head

    def forward(self, x):
        return self.head(self.relu(torch.cat([self.relu(self.left(x)), self.right(x)], 1)))


def test_a_module_that_is_called_twice():
    torch.manual_seed(0)
    model = Branches(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2))).eval()
    layer = saliency.find_last_feature_layer(model, 16)
    assert (layer.module, layer.call, layer.axes) == (model.relu, 1, "NCHW")
    x = torch.rand(2, 3, 16, 16)
    values = saliency.gradcam(model, x, torch.tensor([0, 1]), layer=layer)
    maps = torch.cat([model.left(x).relu(), model.right(x)], 1).relu()
    cam = torch.einsum("nkhw,nk->nhw", maps, model.head[2].weight[[0, 1]]).relu() / maps[0, 0].numel()
    expected = nn.functional.interpolate(cam[:, None], (16, 16), mode="bilinear")[:, 0]
    torch.testing.assert_close(values, expected.detach())


def test_ambiguous_axes_are_rejected():
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(ConfigError, match=r"axes of the feature maps \(1, 7, 7, 7\) unknown"):
        saliency.find_last_feature_layer(model, 9)


@pytest.mark.parametrize("objective", ["score", "loss"])
def test_layercam_and_scorecam_equal_slow_references(small_model, objective):
    model, x, classes = small_model
    layer, sign = saliency.FeatureLayer(model[1]), -1 if objective == "loss" else 1
    layer_cams, score_cams = [], []
    for image, k in zip(x, classes, strict=True):
        maps = model[:2](image[None]).detach().requires_grad_()
        value = sign * saliency.OBJECTIVES[objective](model[2:](maps), k[None])[0]
        gradient = torch.autograd.grad(value, maps)[0][0]
        layer_cam, scores = torch.zeros(14, 14, dtype=torch.float64), []
        for channel, g in zip(maps[0].detach(), gradient, strict=True):
            layer_cam += g.clamp(min=0) * channel
            if channel.min() == channel.max():  # a constant channel has weight 0
                scores.append(torch.tensor(-torch.inf))
                continue
            mask = nn.functional.interpolate(channel[None, None], (16, 16), mode="bilinear")[0]
            masked = image * (mask - mask.min()) / (mask.max() - mask.min())
            scores.append(sign * saliency.OBJECTIVES[objective](model(masked[None]), k[None])[0].detach())
        layer_cams.append(layer_cam.clamp(min=0))
        weights = [float(score.exp()) for score in scores]
        total = sum(w * m for w, m in zip(weights, maps[0].detach(), strict=True)) / sum(weights)
        score_cams.append(total.clamp(min=0))

    def resize(cams):
        return nn.functional.interpolate(torch.stack(cams)[:, None], (16, 16), mode="bilinear")[:, 0]

    torch.testing.assert_close(saliency.layercam(model, x, classes, objective, layer=layer), resize(layer_cams))
    values = saliency.scorecam(model, x, classes, objective, layer=layer, batch_size=3)
    torch.testing.assert_close(values, resize(score_cams))


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_layercam_of_a_transformer_equals_captum(name):
    model, size_px = random_model(name)
    layer = saliency.find_last_feature_layer(model, size_px, "layercam")
    images, classes = torch.rand(1, 3, size_px, size_px), torch.tensor([1])
    layer_name, axes = LAYERS[name]
    values = saliency.layercam(model, images, classes, layer=layer)
    parent, _, key = layer_name.rpartition(".")
    wrapped = AsMaps(layer.module, axes)
    setattr(model.get_submodule(parent), key, wrapped)
    maps = attr.LayerActivation(model, wrapped.maps).attribute(images)
    slope = attr.LayerGradientXActivation(model, wrapped.maps, multiply_by_inputs=False).attribute(images, target=1)
    cam = (slope.relu() * maps).sum(1, keepdim=True).relu()
    expected = nn.functional.interpolate(cam, (size_px, size_px), mode="bilinear")[:, 0].detach()
    assert values.max() > 0
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
