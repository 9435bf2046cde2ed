"""State of a model outside its state_dict is reported, whatever its type; other attributes are not."""

import collections
import itertools
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from cvlab import _compat, layers, registry
from cvlab.engine.unsaved_state import UnsavedState, warning
from cvlab.experiments.classification.models import registry as model_registry
from tests import tiny


class Block(nn.Module):
    """A layer with an attribute `value` that each forward pass mutates or replaces."""

    def __init__(self, value, mutate=lambda value: None, replace=None):
        super().__init__()
        self.value, self.steps = value, (mutate, replace)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        mutate, replace = self.steps
        mutate(self.value)
        if replace is not None:
            self.value = replace(self.value)
        return self.linear(x)


def reported_names(model, example, num_steps=2):
    """Train a model for a few steps; return the names that are reported."""
    observer = UnsavedState(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    names = None
    for step in range(num_steps):
        optimizer.zero_grad()
        outputs = model.train()(example)
        sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        optimizer.step()
        names = observer.observe_step(is_last=step == num_steps - 1)
    return names


def increment(holder, key):
    holder[key] += 1


REPLACED = {
    "int": (0, lambda value: value + 1),
    "float": (1.0, lambda value: value * 0.9),
    "toggled": (False, lambda value: not value),
    "set once": (False, lambda _value: True),
    "string": ("a", lambda value: value + "a"),
    "bytes": (b"", lambda value: value + b"a"),
    "NumPy number": (np.int64(0), lambda value: value + 1),
    "tensor": (torch.zeros(3), lambda value: value + 1),
    "scalar tensor": (torch.tensor(0), lambda value: value + 1),
    "array": (np.zeros(3), lambda value: value + 1),
    "tuple": ((0,), lambda value: (value[0] + 1,)),
    "once unset": (None, lambda value: (value or 0) + 1),
}
MUTATED = {
    "tensor": (torch.zeros(3), lambda value: value.add_(1)),
    "bfloat16": (torch.zeros(2, dtype=torch.bfloat16), lambda value: value.add_(1)),
    "complex": (torch.zeros(2, dtype=torch.complex64), lambda value: value.add_(1j)),
    "bool": (torch.zeros(2, dtype=torch.bool), lambda value: value.logical_not_()),
    "strided": (torch.zeros(4, 4)[::2, 1], lambda value: value.add_(1)),
    "array": (np.zeros((2, 2)), lambda value: increment(value, (0, 1))),
    "array of objects": (np.array([0, "a"], dtype=object), lambda value: increment(value, 0)),
    "list": ([], lambda value: value.append(1)),
    "element": ([0, 0], lambda value: increment(value, 1)),
    "tensor in a list": ([torch.zeros(2)], lambda value: value[0].add_(1)),
    "dict": ({"n": 0}, lambda value: increment(value, "n")),
    "nested": ({"a": [{"n": 0}]}, lambda value: increment(value["a"][0], "n")),
    "Counter": (collections.Counter(), lambda value: value.update("a")),
    "deque": (collections.deque([0, 1], maxlen=2), lambda value: value.append(value[-1] + 1)),
    "set": (set(), lambda value: value.add(len(value))),
    "object": (types.SimpleNamespace(n=0), lambda value: increment(vars(value), "n")),
    "iterator": (itertools.count(), next),
    "module in a list": ([nn.BatchNorm1d(4)], lambda value: value[0](torch.randn(8, 4))),
    "torch.Generator": (torch.Generator(), lambda value: torch.rand(1, generator=value)),
    "random.Random": (random.Random(0), lambda value: value.random()),
    "SystemRandom": (random.SystemRandom(), lambda value: value.random()),
    "default_rng": (np.random.default_rng(0), lambda value: value.random()),
    "MT19937": (np.random.Generator(np.random.MT19937(0)), lambda value: value.random()),
    "RandomState": (np.random.RandomState(0), lambda value: value.rand()),
    "generator that is not used": (torch.Generator(), lambda _value: None),
    "generator in a list": ([random.Random(0)], lambda value: value[0].random()),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_an_attribute_that_is_replaced_is_reported(kind):
    value, replace = REPLACED[kind]
    model = nn.Sequential(nn.Linear(4, 4), Block(value, replace=replace))
    assert reported_names(model, torch.ones(2, 4)) == ["1.value"]


@pytest.mark.parametrize("kind", MUTATED)
def test_an_attribute_that_is_changed_in_place_is_reported(kind):
    value, mutate = MUTATED[kind]
    model = nn.Sequential(nn.Linear(4, 4), Block(value, mutate))
    assert reported_names(model, torch.ones(2, 4)) == ["1.value"]


def test_class_attributes_and_buffers_that_are_not_saved_are_reported():
    class Net(nn.Linear):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            self.mean.add_(1)
            self.count.add_(1)
            return super().forward(x)

    model = Net(4, 3)
    model.register_buffer("mean", torch.zeros(1))
    model.register_buffer("count", torch.zeros(1), persistent=False)
    assert reported_names(model, torch.ones(2, 4)) == ["Net.calls", "count"]


def test_a_change_in_the_backward_pass_is_reported():
    model = Block(0)
    model.register_full_backward_hook(lambda module, *_: setattr(module, "value", module.value + 1))
    assert reported_names(model, torch.ones(2, 4, requires_grad=True)) == ["value"]


def test_a_counter_is_reported_after_a_single_step():
    assert reported_names(Block(0, replace=lambda value: value + 1), torch.ones(2, 4), num_steps=1) == ["value"]


@pytest.mark.parametrize(
    ("value", "mutate", "replace"),
    [
        pytest.param(None, lambda _value: None, lambda _value: torch.ones(3), id="cache"),
        pytest.param({}, lambda value: value.setdefault(3, torch.ones(3)), None, id="cache by size"),
        pytest.param(len, lambda _value: None, None, id="function"),
        pytest.param(np, lambda _value: None, None, id="module"),
        pytest.param(collections.Counter, lambda _value: None, None, id="class"),
        pytest.param(float("nan"), lambda _value: None, lambda _value: float("nan"), id="NaN"),
        pytest.param(torch.ones(2).to_sparse(), lambda _value: None, None, id="sparse"),
        pytest.param(torch.ones(2, device="meta"), lambda _value: None, None, id="meta"),
        pytest.param(object(), lambda _value: None, None, id="object"),
    ],
)
def test_attributes_that_are_not_state_are_not_reported(value, mutate, replace):
    assert reported_names(Block(value, mutate, replace), torch.ones(2, 4)) == []


def test_views_of_saved_tensors_and_results_are_not_reported():
    class Net(nn.Linear):
        def forward(self, x):
            self.weights, self.view, self.loop = [self.weight, self.bias], self.weight[:1], [self]
            self.result = super().forward(x)
            return self.result

    assert reported_names(Net(4, 3), torch.ones(2, 4)) == []


def test_parametrized_weights_are_not_reported():
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        assert reported_names(wrap(nn.Linear(4, 3)), torch.ones(2, 4)) == []


LIBRARY_MODELS = {
    "timm": ["test_resnet", "test_vit", "test_efficientnet_gn"],
    "torchvision": ["shufflenet_v2_x0_5", "mobilenet_v3_small"],
}
SLOW_LIBRARY_MODELS = {
    "timm": ["test_byobnet", "test_convnext", "test_efficientnet_ln", "test_nfnet", "test_vit2", "test_mambaout"],
    "torchvision": ["resnet18", "densenet121", "googlenet", "swin_t", "vit_b_32"],
}


@pytest.mark.parametrize("library_models", [LIBRARY_MODELS, pytest.param(SLOW_LIBRARY_MODELS, marks=pytest.mark.slow)])
def test_models_of_timm_and_torchvision_are_not_reported(library_models):
    for name in library_models["timm"]:
        model = _compat.timm().create_model(name, num_classes=3)
        size = model.default_cfg["input_size"][-1]
        assert reported_names(model, torch.rand(2, 3, size, size)) == [], name
    for name in library_models["torchvision"]:
        size = 224 if name == "vit_b_32" else 64
        arguments = {"init_weights": True} if name == "googlenet" else {}
        model = getattr(_compat.torchvision().models, name)(weights=None, num_classes=3, **arguments)
        assert reported_names(model, torch.rand(2, 3, size, size)) == [], name


@pytest.mark.parametrize("name", ["deep_convnet", "three_layer_convnet", "fc_net", "preact_resnet", "whiten_net"])
def test_models_of_cvlab_are_not_reported(name, tmp_path):
    shape = {"in_channels": 3, "image_size": 32, "num_classes": 3}
    arguments = {"deep_convnet": {"filters": (4,), "pools": (0,)}, "fc_net": {"hidden": (4,)}}.get(name, {})
    namespace = registry.get("layers", "torch", layers.LAYERS)
    model = model_registry.build(name, arguments, tmp_path, layers=namespace, **shape)
    assert reported_names(model, torch.rand(2, 3, 32, 32)) == []


def test_a_run_without_unsaved_state_does_not_warn(tmp_path):
    tiny.train(tmp_path)
    assert "warning" not in (tmp_path / "log.txt").read_text()


def test_the_warning_names_at_most_three_attributes():
    assert "attribute `a` changes during" in warning(["a"])
    assert "attributes `a`, `b`, `c` and 2 more change during" in warning(list("abcde"))
