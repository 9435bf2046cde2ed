"""Features of the layers of a pretrained model."""

import types

import pytest
import torch
from torch import nn

from cvlab.engine import memory
from cvlab.errors import ConfigError
from cvlab.models import features, pretrained
from tests.models.random_models import random_model, squeezenet


class TestFeatures:
    def test_features_equal_those_of_the_whole_model(self):
        model = pretrained.build()
        expected = {}
        hook = model.module.model.blocks[3].register_forward_hook(lambda m, i, o: expected.update(whole=o))
        image = torch.rand(3, 64, 96)
        with torch.no_grad():
            model.module(image[None].contiguous(memory_format=torch.channels_last))
        hook.remove()
        feature_maps = features.FeatureExtractor(model, ["blocks.3", "blocks.1"])(image)
        assert list(feature_maps) == ["blocks.1", "blocks.3"] or list(feature_maps) == ["blocks.3", "blocks.1"]
        torch.testing.assert_close(feature_maps["blocks.3"], expected["whole"][0])

    def test_computation_stops_after_the_deepest_layer(self):
        model = pretrained.build()
        calls = []
        leaves = [module for module in model.module.model.blocks[4].modules() if not list(module.children())]
        hooks = [module.register_forward_hook(lambda m, i, o: calls.append(1)) for module in leaves]
        features.FeatureExtractor(model, ["blocks.3"])(torch.rand(3, 64, 64))
        assert not calls
        features.FeatureExtractor(model, ["blocks.5"])(torch.rand(3, 64, 64))
        assert calls
        for hook in hooks:
            hook.remove()
        assert not any(module._forward_hooks for module in model.module.modules())

    def test_unknown_layer(self):
        with pytest.raises(ConfigError, match=r"unknown layer 'blocks\.9'.*blocks\.6"):
            features.FeatureExtractor(pretrained.build(), ["blocks.9"])

    def test_layer_without_feature_map(self):
        with pytest.raises(ConfigError, match=r"'classifier'.*no map"):
            features.FeatureExtractor(pretrained.build(), ["classifier"])(torch.rand(3, 64, 64))

    def test_in_place_activation_does_not_change_the_features(self, tmp_path):
        model = squeezenet("1_1", tmp_path)
        image = torch.rand(3, 64, 64)
        feature_map = features.FeatureExtractor(model, ["features.0", "features.3"])(image)["features.0"]
        assert float(feature_map.min()) < 0  # before the ReLU that follows
        single = features.FeatureExtractor(model, ["features.0"])(image)["features.0"]
        torch.testing.assert_close(feature_map, single)

    @pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_0"])
    def test_default_layers_of_any_family(self, name, tmp_path):
        model = random_model(name, tmp_path)
        layers = features.default_style_layers(model)
        maps = features.FeatureExtractor(model, [*layers.style, layers.content])(torch.rand(3, 128, 128))
        heights = [maps[key].shape[1] for key in layers.style]
        assert len(heights) >= 3
        assert heights == sorted(heights, reverse=True)
        assert len(set(heights)) >= 3


def test_memory_estimate_grows_with_the_pixels():
    model = pretrained.build()

    def estimate(layer, height):
        extractor, parameters = features.FeatureExtractor(model, [layer]), model.module.parameters()
        return memory.estimate_activation_bytes(extractor, parameters, height, 256, torch.device("cpu"))

    shallow, deep = estimate("blocks.0", 256), estimate("blocks.5", 256)
    assert 256 * 256 * 100 < shallow < deep
    assert estimate("blocks.5", 512) == pytest.approx(2 * deep)


class DataDependent(nn.Module):
    """A model whose control flow depends on its input, which torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 8, 3)

    def forward(self, images):
        hidden = self.first(images)
        if hidden.sum() > 0:
            hidden = hidden * 2
        return self.second(hidden).mean((2, 3))


class WithoutNormalization(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def normalize(self, images):
        return images


def test_features_of_a_model_that_cannot_be_traced():
    model = DataDependent()
    classifier = types.SimpleNamespace(
        module=WithoutNormalization(model), name="data_dependent", transform=types.SimpleNamespace(size_px=16)
    )
    images = torch.rand(2, 3, 16, 16)
    extracted = features.FeatureExtractor(classifier, ["first"]).batch(images)
    torch.testing.assert_close(extracted["first"], model.first(images), rtol=0, atol=0)
