"""EfficientNet-Lite: timm's weights load by name, and all outputs are timm's; traced and cut like any other network."""

import pytest
import torch
from torch import nn

from cvlab import _compat
from cvlab.models import features, graph, pretrained, weights
from cvlab.models.efficientnet import VARIANTS, Conv2dSame, EfficientNetLite
from cvlab.models.names import BY_PIP


def twins(variant):
    """Return timm's network with random weights and statistics, and cvlab's with the same."""
    torch.manual_seed(0)
    theirs = _compat.timm().create_model(f"tf_{variant}").eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    ours = EfficientNetLite(variant).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_outputs_are_timms(variant):
    theirs, ours = twins(variant)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for size in (224, 97, 128):
        images = torch.randn(2, 3, size, size + 31)
        with torch.inference_mode():
            expected = theirs(images)
            torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_training_are_timms(variant):
    theirs, ours = twins(variant)
    images = torch.randn(2, 3, 64, 64)
    for network in (theirs, ours):
        network.train()
        network(images).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_are_brought_in_as_timm_does(variant):
    about = weights.timm_config(f"tf_{variant}")
    transform = pretrained.preprocessing(variant).transform
    assert transform.size_px == about["input_size"][-1]
    assert transform.resize_px == int(about["input_size"][-1] / about["crop_pct"])
    assert transform.filter == about["interpolation"]
    assert list(VARIANTS) == list(BY_PIP)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 3)])
@pytest.mark.parametrize("size", [7, 8, 9, 32])
def test_padding_of_tensorflow(kernel, stride, size):
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


def test_cut_at_any_layer():
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
    found = features.FeatureExtractor(model, names).batch(images)
    for name in names:
        torch.testing.assert_close(found[name], outputs[name])


def test_nothing_behind_the_last_layer_is_computed():
    network = EfficientNetLite("efficientnet_lite0").eval()
    traced = graph.trace(network, {"blocks.1": "maps"})
    targets = [str(node.target) for node in traced.graph.nodes]
    assert any(target.startswith("blocks.1") for target in targets)
    assert not any(target.startswith(("blocks.2", "conv_head", "classifier")) for target in targets)
    with pytest.raises(ValueError, match=r"blocks\.9"):
        graph.trace(network, {"blocks.9": "maps"})


def test_another_classifier_and_none():
    network = EfficientNetLite("efficientnet_lite0", num_classes=3, in_channels=1).eval()
    assert network(torch.rand(2, 1, 40, 40)).shape == (2, 3)
    network.reset_classifier(0)
    assert network(torch.rand(2, 1, 40, 40)).shape == (2, 1280)
