"""EfficientNet-Lite: names, outputs and gradients equal timm's; it is traced and cut like any other network."""

import pytest
import torch
from torch import nn

from cvlab import _compat
from cvlab.models import features, graph, pretrained, weights
from cvlab.models.efficientnet import VARIANTS, Conv2dSame, EfficientNetLite
from cvlab.models.names import BY_PIP


def reference_and_model(variant):
    """Return timm's network with random weights and statistics, and cvlab's with the same weights."""
    torch.manual_seed(0)
    reference = _compat.timm().create_model(f"tf_{variant}").eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model = EfficientNetLite(variant).eval()
    model.load_state_dict(reference.state_dict())
    return reference, model


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_outputs_equal_those_of_timm(variant):
    reference, model = reference_and_model(variant)
    assert list(model.state_dict()) == list(reference.state_dict())
    for size in (224, 97, 128):
        images = torch.randn(2, 3, size, size + 31)
        with torch.inference_mode():
            expected = reference(images)
            torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_training_equal_those_of_timm(variant):
    reference, model = reference_and_model(variant)
    images = torch.randn(2, 3, 64, 64)
    for network in (reference, model):
        network.train()
        network(images).square().sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(reference.named_buffers())[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_preprocessing_equals_that_of_timm(variant):
    config = weights.timm_config(f"tf_{variant}")
    transform = pretrained.preprocessing(variant).transform
    assert transform.size_px == config["input_size"][-1]
    assert transform.resize_px == int(config["input_size"][-1] / config["crop_pct"])
    assert transform.filter == config["interpolation"]
    assert list(VARIANTS) == list(BY_PIP)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 3)])
@pytest.mark.parametrize("size", [7, 8, 9, 32])
def test_padding_equals_that_of_tensorflow(kernel, stride, size):
    conv = Conv2dSame(1, 1, kernel, stride, bias=False).requires_grad_(False)
    image = torch.randn(1, 1, size, size)
    count = -(-size // stride)
    total = max((count - 1) * stride + kernel - size, 0)
    padded = torch.zeros(1, 1, size + total, size + total)
    padded[..., total // 2 : total // 2 + size, total // 2 : total // 2 + size] = image
    expected = [
        [
            float((padded[0, 0, i : i + kernel, j : j + kernel] * conv.weight[0, 0]).sum())
            for j in range(0, count * stride, stride)
        ]
        for i in range(0, count * stride, stride)
    ]
    torch.testing.assert_close(conv(image)[0, 0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_features_of_any_layer():
    model = pretrained.build()
    network = model.module.model
    names = ["bn1", "blocks.2", "blocks.5.1", "bn2"]
    outputs = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: outputs.update({name: output})
        )
        for name in names
    ]
    images = torch.rand(2, 3, 96, 128)
    with torch.inference_mode():
        network(model.module.normalize(images))
    for handle in handles:
        handle.remove()
    feature_maps = features.FeatureExtractor(model, names).batch(images)
    for name in names:
        torch.testing.assert_close(feature_maps[name], outputs[name])


def test_layers_after_the_last_requested_one_are_not_computed():
    network = EfficientNetLite("efficientnet_lite0").eval()
    traced = graph.trace(network, {"blocks.1": "maps"})
    targets = [str(node.target) for node in traced.graph.nodes]
    assert any(target.startswith("blocks.1") for target in targets)
    assert not any(target.startswith(("blocks.2", "conv_head", "classifier")) for target in targets)
    with pytest.raises(ValueError, match=r"blocks\.9"):
        graph.trace(network, {"blocks.9": "maps"})


def test_other_classifier_and_no_classifier():
    network = EfficientNetLite("efficientnet_lite0", num_classes=3, in_channels=1).eval()
    assert network(torch.rand(2, 1, 40, 40)).shape == (2, 3)
    network.reset_classifier(0)
    assert network(torch.rand(2, 1, 40, 40)).shape == (2, 1280)
