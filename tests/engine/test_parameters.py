"""Frozen parameters and learning-rate factors, given by patterns of parameter names."""

import json

import pytest
import torch
from torch import nn

from cvlab.engine import loop, parameters
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError
from tests import tiny

MODEL = "model={name: deep_convnet, filters: [8, 8], pools: [0, 1], batchnorm: true}"
SHORT = ("data.num_train=100", "duration={steps: 4}", "batch_size=20", "expect=[]", MODEL)


def build_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    )


def train_a_step(model, config, factor=1.0):
    """Take a step; return the largest change of each entry of the state_dict that changes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = loop.TrainState(model, parameters.build_optimizer(config, model))

    def loss_fn(model, batch):
        return {"loss": model(batch).square().sum()}

    ctx = ComputeContext(torch.device("cpu"), "float32", 1)
    next(loop.fit(state, loss_fn, lambda _: torch.randn(5, 3, 8, 8), lr_factor=lambda _: factor, ctx=ctx))
    return {
        name: float((value - before[name]).abs().max())
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (("0.*",), {"0.weight", "0.bias"}),
        (("0.*", "1.*"), {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}),
        (("[01].weight",), {"0.weight", "1.weight"}),
        (("4.weight", "4.bias"), {"4.weight", "4.bias", "4.running_mean", "4.running_var"}),
    ],
)
def test_frozen_parameters_and_their_statistics_do_not_change(patterns, frozen):
    model = build_model()
    frozen = frozen | ({name.replace("running_mean", "num_batches_tracked") for name in frozen if "mean" in name})
    assert set(model.state_dict()) - set(train_a_step(model, tiny.settings(freeze=patterns))) == frozen


def test_factors_multiply_and_scale_the_step():
    torch.manual_seed(0)
    config = tiny.settings("sgd", lr_factors={"0.*": 0.5, "*.weight": 0.1})
    model = build_model()
    optimizer = parameters.build_optimizer(config, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    measured = {name: rates[id(parameter)] / 1e-2 for name, parameter in model.named_parameters()}
    expected = {name: (0.5 if name[0] == "0" else 1) * (0.1 if name.endswith("weight") else 1) for name in measured}
    assert measured == pytest.approx(expected)
    assert len(rates) == len(list(model.parameters()))


def test_factors_and_frozen_parameters_with_muon():
    config = tiny.settings()
    muon = parameters.optimizers.OPTIMIZERS.schema("muon", tiny.Path())(name="muon")
    config = config.model_copy(update={"optimizer": muon, "freeze": ("0.*",), "lr_factors": {"5.*": 0.5}})
    model = build_model()
    rates = {id(p): g["lr"] for g in parameters.build_optimizer(config, model).param_groups for p in g["params"]}
    assert id(model[0].weight) not in rates
    assert rates[id(model[5].weight)] == pytest.approx(0.67 / 2)
    assert rates[id(model[5].bias)] == pytest.approx(0.05 / 2)
    assert rates[id(model[3].bias)] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": ("6.*",)}, r"freeze: '6\.\*' matches no parameter"),
        ({"freeze": ("0.weigt",)}, "freeze: '0.weigt' matches no parameter; did you mean '0.weight'"),
        ({"freeze": ("*",)}, "no parameter is left to train"),
        ({"freeze": ("0.*",), "lr_factors": {"0.*": 0.1}}, "lr_factors: .* matches no parameter that is trained"),
    ],
)
def test_a_pattern_that_matches_nothing_is_rejected(change, message):
    with pytest.raises(ConfigError, match=message):
        parameters.build_optimizer(tiny.settings(**change), build_model())


def test_a_frozen_run_resumes_bitwise(tmp_path):
    from cvlab.errors import StoppedError
    from tests.engine.test_early_stopping import stop_at

    config = tiny.settings(freeze=("0.*", "1.*"), lr_factors={"5.*": 0.3})
    _, summary = tiny.train(tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, stop_at(9))
    assert tiny.train(tmp_path / "stopped", config)[1] == summary
    assert summary["weights_sha256"] != tiny.train(tmp_path / "free")[1]["weights_sha256"]


def test_from_the_command_line(cvlab, tmp_path):
    code, out, err = cvlab("train", "quickstart", *SHORT, "freeze=['0.*', '1.*']", "lr_factors={'*': 0.5}", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["steps"] == 4
    code, _, err = cvlab("train", "quickstart", *SHORT, "freeze=['nothing.*']", "--dry-run")
    assert code == 2
    assert "freeze: 'nothing.*' matches no parameter" in err


@pytest.mark.parametrize("name", ["yolo_scenes", "caption_scenes"])
def test_the_plan_checks_the_patterns_of_detectors_and_captioners(cvlab, name):
    code, out, err = cvlab("train", name, "lr_factors={'nothing.*': 2}", "--dry-run")
    assert (code, out) == (2, "")
    assert "lr_factors: 'nothing.*' matches no parameter" in err
