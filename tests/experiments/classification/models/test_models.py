"""All registered models: shapes, initialization, gradients; and the models of timm and torchvision."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cvlab import _compat
from cvlab.errors import ConfigError
from cvlab.experiments.classification.models import registry as model_registry
from cvlab.experiments.classification.models.convnet import deep_convnet, three_layer_convnet
from cvlab.experiments.classification.models.resnet import Residual, preact_resnet
from cvlab.experiments.classification.models.whiten_net import ConvBlock, whiten_net
from cvlab.layers.init import init_weights
from cvlab.layers.modules import MANUAL_ALT_LAYERS, MANUAL_LAYERS

ARGUMENTS = {
    "deep_convnet": {"filters": (4, 8), "pools": (0, 1), "batchnorm": True},
    "three_layer_convnet": {"num_filters": 4, "hidden": 10},
    "fc_net": {"hidden": (10, 5), "dropout": 0.5},
    "api_barebones": {},
    "api_module": {"channels": (4, 3)},
    "api_sequential": {},
    "preact_resnet": {"stem": 4, "stages": ((4, 1), (8, 2))},
    "whiten_net": {"widths": (8, 8)},
}
PRETRAINED = {"pretrained", "efficientnet_lite0", "efficientnet_lite2"}  # see test_transfer.py, test_finetune.py
FROM_SCRATCH = [name for name in model_registry.MODELS if name not in PRETRAINED]


@pytest.mark.parametrize("name", FROM_SCRATCH)
@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 10), (1, 28, 7)])
def test_every_model_maps_images_to_logits(name, channels, size, classes):
    model = model_registry.build(
        name, ARGUMENTS[name], Path(), in_channels=channels, image_size=size, num_classes=classes, layers=nn
    )
    logits = model(torch.randn(5, channels, size, size))
    assert logits.shape == (5, classes)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if name != "preact_resnet":  # has torch's initialization
        assert all(not p.any() for key, p in model.named_parameters() if key.endswith("bias"))


def test_the_three_api_levels_are_the_same_model():
    images, logits = torch.randn(2, 3, 8, 8), []
    for name in ("api_barebones", "api_module", "api_sequential"):
        torch.manual_seed(4)
        injected = {"in_channels": 3, "image_size": 8, "num_classes": 10, "layers": nn}
        logits.append(model_registry.build(name, {}, Path(), **injected)(images))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def weighted_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def test_residual_networks():
    resnet, plain = preact_resnet(), preact_resnet(residual=False)
    assert len(weighted_layers(plain)) == 32
    shortcuts = [layer for layer in weighted_layers(resnet) if getattr(layer, "kernel_size", None) == (1, 1)]
    # a shortcut has weights where the size or the number of channels changes
    assert len(weighted_layers(resnet)) == 32 + len(shortcuts) == 34
    x = torch.randn(2, 8, 6, 6)
    block = next(layer for layer in resnet if isinstance(layer, Residual))
    torch.testing.assert_close(block(x), x + block.block(x))
    assert preact_resnet(image_size=8, bottleneck=True)(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    kaiming = preact_resnet(stages=((64, 1), (64, 1)), init="kaiming")
    kaiming_weight = kaiming[2].block[2].weight
    torch_weight = preact_resnet(stages=((64, 1), (64, 1)))[2].block[2].weight
    assert (kaiming_weight.var() / torch_weight.var()).item() == pytest.approx(6, rel=0.1)
    assert kaiming[3].shortcut.weight.var().item() == pytest.approx(1 / 64, rel=0.1)
    assert kaiming[-1].weight.var().item() == pytest.approx(1 / 64, rel=0.2)
    assert not kaiming[-1].bias.any()
    with pytest.raises(ConfigError, match="bottleneck needs at least 4"):
        preact_resnet(stages=((2, 1),), bottleneck=True)
    with pytest.raises(ConfigError, match="do not fit"):
        preact_resnet(stages=())
    with pytest.raises(ConfigError, match="do not fit"):
        preact_resnet(stages=((2, 1),) * 5, image_size=8)


def test_the_first_layer_whitens_the_images_it_is_initialized_from():
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.randn(300, 3, 14, 14), 3, stride=1, padding=1)
    images = smooth @ torch.randn(14, 14) * 0.2
    model = whiten_net((8,), image_size=14)
    model.init_from_images(images)
    out = nn.functional.conv2d(images, model[0].weight)[:, :12]  # the other twelve filters are their negatives
    torch.testing.assert_close(out, -nn.functional.conv2d(images, model[0].weight)[:, 12:])
    rows = out.permute(1, 0, 2, 3).reshape(12, -1)
    torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(12), atol=0.05, rtol=0)
    assert not model[0].weight.requires_grad
    fewer = whiten_net((8,), image_size=14, max_whitening_filters=5)
    fewer.init_from_images(images)
    largest = model[0].weight[:5]
    torch.testing.assert_close(fewer[0].weight, torch.cat([largest, -largest]))
    assert len(whiten_net((8,), in_channels=1, max_whitening_filters=5)[0].weight) == 8


def test_partial_identity_preserves_its_input():
    conv = next(layer for layer in whiten_net((32,)).modules() if isinstance(layer, nn.Conv2d) and layer.bias is None)
    x = torch.randn(2, 24, 7, 7)
    torch.testing.assert_close(conv(x)[:, :24], x)
    assert conv(x)[:, 24:].abs().sum() > 0


def test_depths_shortcuts_and_sizes_of_whiten_nets():
    for depth in (1, 2, 3):
        model = whiten_net((8, 12), depth=depth, residual=depth == 3, activation="silu", train_whitening_bias=False)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        assert len([layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]) == 1 + 2 * depth
        assert not model[0].bias.requires_grad
    block = next(layer for layer in model.modules() if isinstance(layer, ConvBlock))
    x = torch.randn(2, 24, 8, 8)
    block.eval()
    first = block.first(x)
    torch.testing.assert_close(block(x), nn.functional.silu(first + block.inner(first)))
    with pytest.raises(ConfigError, match="halvings leave no pixel of 7 px"):
        whiten_net((4, 4, 4), image_size=8)


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_hand_written_layers_have_the_gradients_of_torch(name):
    models = []
    for layers in (nn, MANUAL_LAYERS, MANUAL_ALT_LAYERS):
        torch.manual_seed(2)
        injected = {"in_channels": 3, "image_size": 8, "num_classes": 4, "layers": layers}
        if name == "api_barebones" and layers is not nn:
            with pytest.raises(ConfigError, match="does not take `layers`"):
                model_registry.build(name, {}, Path(), **injected)
            return
        arguments = {key: value for key, value in ARGUMENTS[name].items() if key != "dropout"}
        models.append(model_registry.build(name, arguments, Path(), **injected).double())
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for model in models:
        model(images).square().sum().backward()
    for model in models[1:]:
        for p, expected in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-9, atol=1e-9)


def test_a_model_is_built_from_the_given_layers():
    class CustomConv2d(nn.Conv2d):
        pass

    class Layers:
        Conv2d = CustomConv2d

        def __getattr__(self, name):
            return getattr(nn, name)

    model = deep_convnet(filters=(4, 8), layers=Layers())
    assert sum(isinstance(layer, CustomConv2d) for layer in model) == 2
    assert model.state_dict().keys() == deep_convnet(filters=(4, 8)).state_dict().keys()


@pytest.mark.parametrize(("layer", "fan_in"), [(nn.Linear(500, 400), 500), (nn.Conv2d(30, 200, 5), 750)])
def test_kaiming_and_fixed_scales(layer, fan_in):
    torch.manual_seed(0)
    for scale, before_relu, expected in (
        ("kaiming", True, (2 / fan_in) ** 0.5),
        ("kaiming", False, (1 / fan_in) ** 0.5),
        (0.03, True, 0.03),
    ):
        weight = init_weights(layer, scale, before_relu).weight
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert weight.mean().item() == pytest.approx(0, abs=0.02 * expected)
        assert not layer.bias.any()


def test_pooling_before_the_relu_is_bitwise_identical():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    fast, slow = (nn.Sequential(*order) for order in ((nn.MaxPool2d(2), nn.ReLU()), (nn.ReLU(), nn.MaxPool2d(2))))
    weight = torch.randn(4, 3, 4, 4)
    gradients = [torch.autograd.grad((model(x) * weight).sum(), x)[0] for model in (fast, slow)]
    assert torch.equal(fast(x), slow(x))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: deep_convnet(filters=()), "at least one block"),
        (lambda: deep_convnet(filters=(4,), pools=(1,)), r"model\.pools \[1\]"),
        (lambda: deep_convnet(filters=(4, 4), pools=(0, 0)), "different block"),
        (lambda: deep_convnet(filters=(4,) * 7, pools=tuple(range(7))), "no pixel of 32 px"),
        (lambda: three_layer_convnet(filter_size=4), "must be odd"),
    ],
)
def test_impossible_models_are_rejected(build, text):
    with pytest.raises(ConfigError, match=text):
        build()


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_models_of_timm_and_torchvision(name):
    model = model_registry.build(name, {}, Path(), in_channels=3, image_size=64, num_classes=4, layers=nn).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("timm:resnet19", {}, "did you mean 'resnet1"),
        ("torchvision:resnet19", {}, "did you mean 'resnet1"),
        ("timm:resnet10t", {"widht": 3}, "widht"),
        ("torchvision:resnet18", {"widht": 3}, "widht"),
        ("timm:resnet10t", {"pretrained": True}, "model.weights=auto"),
        ("keras:resnet", {}, "unknown model 'keras:resnet'"),
    ],
)
def test_errors_of_timm_and_torchvision_are_one_line(name, arguments, text):
    with pytest.raises(ConfigError, match=text) as error:
        model_registry.build(name, arguments, Path(), num_classes=4)
    assert "\n" not in str(error.value)


def test_a_user_function_that_returns_no_model_is_rejected(tmp_path):
    (tmp_path / "net.py").write_text("def make():\n    return 3\n")
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module, got int"):
        model_registry.build("./net.py:make", {}, tmp_path)


def test_errors_of_user_code_are_not_caught(tmp_path):
    (tmp_path / "net.py").write_text("def make():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        model_registry.build("./net.py:make", {}, tmp_path)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        model_registry.get_builder("./broken.py:make", tmp_path)


def test_torchvision_and_timm_can_be_imported():
    assert _compat.torchvision().transforms
    assert _compat.timm().list_models("resnet18")
