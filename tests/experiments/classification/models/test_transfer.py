"""A classifier on a pretrained backbone: its parts equal the whole network, and only the last ones are trained."""

import copy
from pathlib import Path

import pytest
import torch

from cvlab import _compat
from cvlab.engine import optimizers
from cvlab.errors import ConfigError
from cvlab.experiments.classification.models.transfer import TransferClassifier, pretrained_classifier
from cvlab.models import pretrained, split, zoo

NAMES = (
    "timm:resnet10t",
    "timm:test_vit",
    "timm:mobilenetv3_small_050",
    "torchvision:squeezenet1_1",
    "timm:test_convnext",
)


@pytest.fixture
def build_random(tmp_path, monkeypatch):
    """Return a function that builds a pretrained model from a file with random weights."""

    def build(name):
        library, _, model_name = name.partition(":")
        torch.manual_seed(0)
        if library == "timm":
            model = _compat.timm().create_model(model_name)
        else:
            model = zoo.build_torchvision(model_name, num_classes=1000)
        path = tmp_path / "weights.pth"
        torch.save(model.state_dict(), path)
        return pretrained.build(name, str(path))

    pretrained.build.cache_clear()
    split.split.cache_clear()
    yield build
    pretrained.build.cache_clear()
    split.split.cache_clear()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_trunk_and_tail_give_the_features_of_the_whole_network(build_random, name, count):
    backbone = build_random(name)
    parts = split.split(backbone, count)
    whole = copy.deepcopy(backbone.module.model)
    split._remove_classifier(whole, name)
    size = backbone.transform.size_px
    images = torch.rand(3, 3, size, size)
    with torch.no_grad():
        maps = parts.trunk(images)
        assert tuple(maps.shape[1:]) == parts.map_shape
        assert torch.allclose(parts.tail(maps), whole(images), atol=1e-4)
    assert parts.num_features == whole(images).shape[1]
    parameter_ids = {id(p) for part in (parts.trunk, parts.tail) for p in part.parameters()}
    assert not parameter_ids & {id(p) for p in backbone.module.parameters()}


def test_too_many_stages_give_an_error(build_random):
    with pytest.raises(ConfigError, match="stages"):
        split.split(build_random("timm:resnet10t"), 50)


def test_images_maps_and_features_give_the_same_logits():
    model = pretrained_classifier(finetune_epochs=1, num_classes=4)
    torch.nn.init.normal_(model.classifier.weight)
    images = torch.randn(2, *model.image_shape)
    with torch.no_grad():
        maps = model.trunk(images)
        features = model.tail(maps)
        model.standardize(features)
        logits = model(images)
        assert torch.equal(logits, model(maps))
        assert torch.equal(logits, model(features))
    assert logits.shape == (2, 4)


def test_only_the_classifier_and_the_last_stages_are_trained():
    frozen = pretrained_classifier(num_classes=4)
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
    model = pretrained_classifier(finetune_epochs=1, trainable_stages=2, num_classes=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("tail.") for name in trained)
    assert not any(name.startswith("trunk.") for name in trained)
    model.train()
    assert not model.trunk.training
    assert not model.tail.training
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = optimizers.build_optimizer("sgd", model, {"lr": 0.1})
    model(torch.randn(2, *model.image_shape)).square().sum().add(model.classifier.bias.sum()).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= trained
    assert "classifier.bias" in changed


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_the_last_stages_have_a_separate_learning_rate(name):
    model = pretrained_classifier(finetune_epochs=1, finetune_lr=0.25, num_classes=4)
    optimizer = optimizers.build_optimizer(name, model, {"lr": 1e-2})
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for key, p in model.named_parameters():
        if p.requires_grad:
            assert rates.pop(id(p)) == pytest.approx(2.5e-3 if key.startswith("tail.") else 1e-2)
    assert not rates


def test_a_model_without_learning_rate_factors_has_one_parameter_group():
    optimizer = optimizers.build_optimizer("sgd", torch.nn.Linear(2, 2), {"lr": 1e-2})
    assert len(optimizer.param_groups) == 1


def test_fine_tuning_needs_trainable_stages():
    with pytest.raises(ConfigError, match="no stage to train"):
        pretrained_classifier(finetune_epochs=1, trainable_stages=0)


def test_the_features_are_standardized():
    model = pretrained_classifier(num_classes=2)
    assert isinstance(model, TransferClassifier)
    features = torch.randn(50, len(model.mean)) * 3 + 5
    features[:, 0] = 1.0
    model.standardize(features)
    standardized = (features - model.mean) / model.std
    assert standardized.mean(0).abs().max() < 1e-4
    assert torch.allclose(standardized[:, 1:].std(0, correction=0), torch.ones(len(model.mean) - 1), atol=1e-4)
    assert torch.isfinite(standardized).all()


def test_weights_of_another_model_give_a_one_line_error(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(Exception, match="not the weights") as error:
        pretrained_classifier(weights=str(tmp_path / "w.pth"))
    assert "\n" not in str(error.value)
    assert Path(tmp_path / "w.pth").exists()
