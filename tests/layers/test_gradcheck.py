"""`cvlab gradcheck` accepts correct layers, and catches the mistakes that students make."""

import json

import pytest
import torch
from torch import nn

from cvlab.api import gradcheck
from cvlab.engine import update_rules
from cvlab.layers import batchnorm, conv, gradcheck_cases, linear, losses
from cvlab.layers import gradcheck as layers_gradcheck


def check_case(name, seed=0):
    torch.manual_seed(seed)
    return layers_gradcheck.check(next(case for case in gradcheck_cases.cases() if case.name == name))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_layer_passes(seed):
    torch.manual_seed(seed)
    for case in gradcheck_cases.cases():
        result = layers_gradcheck.check(case)
        assert result.ok, result


def scaled(layer, position, factor):
    """Return a backward in which one gradient is wrong by a factor."""
    correct = layer.backward

    def backward(dout, cache):
        return tuple(g * factor if k == position else g for k, g in enumerate(correct(dout, cache)))

    return staticmethod(backward)


def batchnorm_without(term):
    """Return BatchNorm's simplified backward with one term of dx left out."""

    def backward(dout, cache):
        n = dout.shape[0]
        dbeta, dgamma = dout.sum(0), (dout * cache.centered).sum(0) * cache.inv_std
        scale = cache.gamma * cache.inv_std
        terms = [dout * scale, -cache.centered * (scale * cache.inv_std * dgamma / n), -scale * dbeta / n]
        return sum(t for k, t in enumerate(terms) if k != term) + torch.zeros_like(dout), dgamma, dbeta

    return staticmethod(backward)


MUTATIONS = [
    ("Linear", linear.Linear, scaled(linear.Linear, 1, 1.001)),
    ("Linear", linear.Linear, scaled(linear.Linear, 2, 0.0)),
    ("ReLU", linear.ReLU, staticmethod(lambda dout, cache: (dout,))),
    ("Dropout", gradcheck_cases.SeededDropout, staticmethod(lambda dout, cache: (dout * (cache > 0),))),
    ("Conv2d", conv.Conv2d, scaled(conv.Conv2d, 0, -1.0)),
    ("MaxPool2d", conv.MaxPool2d, scaled(conv.MaxPool2d, 0, 0.5)),
    ("Softmax", losses.Softmax, scaled(losses.Softmax, 0, 4.0)),
    *(("BatchNorm, simplified", batchnorm.BatchNormAlt, batchnorm_without(term)) for term in range(3)),
]


@pytest.mark.parametrize(("name", "layer", "wrong"), [pytest.param(*m, id=f"{k}") for k, m in enumerate(MUTATIONS)])
def test_a_wrong_backward_is_caught(name, layer, wrong, monkeypatch):
    assert check_case(name).ok
    if name in ("Softmax",):
        correct = layer.backward
        wrong = staticmethod(lambda dout, cache: (correct(dout, cache)[0] * 4.0, None))
    monkeypatch.setattr(layer, "backward", wrong)
    assert not check_case(name).ok


def test_dropout_without_its_scale_is_caught(monkeypatch):
    def forward(x, p):
        mask = (torch.rand(x.shape) >= p).to(x.dtype)
        return x * mask, mask

    monkeypatch.setattr(linear.Dropout, "forward", staticmethod(forward))
    assert not check_case("Dropout").ok


def adam_without_correction(w, dw, state, lr, betas, eps):
    mean = (1 - betas[0]) * dw + (betas[0] * state["mean"] if state else 0)
    square = (1 - betas[1]) * dw * dw + (betas[1] * state["square"] if state else 0)
    return w - lr * mean / (square.sqrt() + eps), {"mean": mean, "square": square}


@pytest.mark.parametrize(
    ("name", "rule", "wrong"),
    [
        ("Adam", "adam", adam_without_correction),
        ("SGD, momentum", "momentum", lambda w, dw, state, lr, momentum: (w - lr * dw, {})),
        ("RMSProp", "rmsprop", lambda w, dw, state, lr, decay, eps: (w - lr * dw / (dw.abs() + eps), {})),
    ],
)
def test_a_wrong_update_rule_is_caught(name, rule, wrong, monkeypatch, cvlab):
    assert cvlab("gradcheck", name)[0] == 0
    monkeypatch.setattr(update_rules, rule, wrong)
    code, _, err = cvlab("gradcheck", name)
    assert code == 3
    assert f"wrong: {name}" in err


@pytest.mark.parametrize("seed", range(5))
def test_kaiming_without_the_factor_2_is_caught(seed, monkeypatch, cvlab):
    assert cvlab("gradcheck", "Kaiming initialization", "--seed", seed)[0] == 0

    def init_weights(layer, weight_scale, before_relu):
        nn.init.normal_(layer.weight, 0.0, layer.weight[0].numel() ** -0.5)
        nn.init.zeros_(layer.bias)
        return layer

    monkeypatch.setattr(gradcheck, "init_weights", init_weights)
    assert cvlab("gradcheck", "Kaiming initialization", "--seed", seed)[0] == 3


def test_relative_error_has_a_floor():
    x = torch.tensor([1.0, 2.0])
    assert layers_gradcheck.relative_error(x, x) == 0
    assert layers_gradcheck.relative_error(x, -x) == pytest.approx(1)
    assert layers_gradcheck.relative_error(torch.zeros(2), torch.full((2,), 1e-14)) < 1e-3
    assert layers_gradcheck.relative_error(x, torch.ones(3)) == float("inf")
    assert not layers_gradcheck.GradCheckResult("x", float("nan"), 0.0, 1.0).ok


def test_command(cvlab):
    code, out, _ = cvlab("gradcheck", "--json")
    result = json.loads(out)
    names = [check["name"] for check in result["checks"]]
    assert code == 0
    assert result["ok"]
    assert len(names) == 37
    assert {"Conv2d", "SVM", "deep_convnet, BatchNorm, simplified", "fc_net"} <= set(names)
    code, out, _ = cvlab("gradcheck", "Conv2d", "fc_net")
    assert code == 0
    assert "Conv2d" in out
    assert "fc_net" in out
    assert "Softmax" not in out
    code, _, err = cvlab("gradcheck", "Conv3d")
    assert code == 2
    assert "did you mean 'Conv2d'" in err


USER_LAYER = """import torch

class Square:
    @staticmethod
    def forward(x):
        return x * x, x

    @staticmethod
    def backward(dout, cache):
        return (FACTOR * dout * cache,)

    @staticmethod
    def example():
        return (torch.randn(4, 3),)

class Nothing:
    pass
"""

INVALID_LAYERS = {
    "return x * x, x": ("return x * x", "forward must return (out, cache)"),
    "return (FACTOR * dout * cache,)": ("return 2 * dout * cache", "backward must return a tuple of tensors"),
    "return (torch.randn(4, 3),)": ("return torch.randn(4, 3)", "example must return a tuple"),
    "return x * x, x ": ("return x.detach() * x.detach(), x", "autograd cannot follow forward"),
}


@pytest.mark.parametrize("part", INVALID_LAYERS)
def test_an_invalid_user_layer_gives_a_one_line_error(cvlab, tmp_path, part):
    wrong, message = INVALID_LAYERS[part]
    (tmp_path / "mine.py").write_text(USER_LAYER.replace(part.strip(), wrong).replace("FACTOR", "2"))
    code, _, err = cvlab("gradcheck", "./mine.py:Square")
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_user_layer_with_a_transposed_example_and_an_unused_input(cvlab, tmp_path):
    text = USER_LAYER.replace("forward(x)", "forward(x, idle)").replace(
        "FACTOR * dout * cache,", "2 * dout * cache, dout * 0"
    )
    (tmp_path / "mine.py").write_text(text.replace("torch.randn(4, 3),", "torch.randn(4, 3).T, torch.randn(3, 4)"))
    assert cvlab("gradcheck", "./mine.py:Square")[0] == 0


def test_a_user_layer(cvlab, tmp_path):
    (tmp_path / "mine.py").write_text(USER_LAYER.replace("FACTOR", "2"))
    assert cvlab("gradcheck", "./mine.py:Square")[0] == 0
    (tmp_path / "mine.py").write_text(USER_LAYER.replace("FACTOR", "3"))
    code, out, err = cvlab("gradcheck", "./mine.py:Square")
    assert code == 3
    assert "WRONG" in out
    assert "wrong: ./mine.py:Square" in err
    code, out, _ = cvlab("gradcheck", "./mine.py:Square", "--json")
    assert code == 3
    assert json.loads(out)["error"]["code"] == 3
    code, _, err = cvlab("gradcheck", "./mine.py:Nothing")
    assert code == 2
    assert "has no forward, backward, example" in err


LINEAR = """import torch

class Linear:
    @staticmethod
    def forward(x, w, b):
        return x @ w + b, (x, w)

    @staticmethod
    def backward(dout, cache):
        x, w = cache
        dx, dw, db = dout @ w.T, x.T @ dout, dout.sum(0)
        MISTAKE
        return dx, dw, db

    @staticmethod
    def example():
        return torch.randn(5, SIZE), torch.randn(SIZE, 4), torch.randn(4)
"""

MISTAKES = {  # the student's code -> the message about it
    "dw = 0.5 * dw": "dw is 0.5 times what it should be; a constant factor is missing or too many",
    "dw = dw / 5": "dw is 0.2 times what it should be; do not divide by the batch size (5)",
    "db = db * 5": "db is 5 times what it should be; divide by the batch size (5)",
    "dx = -dx": "dx is -1 times what it should be; the sign is wrong",
    "dw = dw.T": "dw has the shape (4, 3), not (3, 4); it is the transpose of what it should be",
    "db = dout[0]": "db is that of the first sample only; add up the gradients of all samples",
    "dw = x[-1:].T @ dout[-1:]": "dw is that of the last sample only",
    "dx = torch.zeros_like(dx)": "dx is 0 everywhere",
    "dx = dx * float('nan')": "dx is not finite",
    "dx[0, 0] += 1": "dx differs in 7% of its elements",
    "db = dout": "db has the shape (5, 4), not (4,)",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_common_mistakes_are_named(cvlab, tmp_path, mistake):
    (tmp_path / "mine.py").write_text(LINEAR.replace("MISTAKE", mistake).replace("SIZE", "3"))
    code, out, err = cvlab("gradcheck", "./mine.py:Linear")
    assert code == 3, err
    lines = [line for line in out.splitlines() if line.startswith("./mine.py:Linear: ")]
    assert len(lines) == 1
    assert MISTAKES[mistake] in lines[0]
    (row,) = json.loads(cvlab("gradcheck", "./mine.py:Linear", "--json")[1])["checks"]
    (gradient,) = row["wrong_gradients"]
    assert gradient["name"] == lines[0].split()[1]
    if gradient["position"] is not None:
        assert gradient["numeric"] == pytest.approx(gradient["expected"], rel=1e-5, abs=1e-7)
        assert "largest error at [" in out


def test_a_square_transpose_is_named(cvlab, tmp_path):
    (tmp_path / "mine.py").write_text(LINEAR.replace("MISTAKE", "dw = dw.T").replace("SIZE", "4"))
    assert "dw is the transpose of what it should be" in cvlab("gradcheck", "./mine.py:Linear")[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("MISTAKE", "raise ValueError('no idea')", "backward raises ValueError: no idea; "),
        ("MISTAKE", "dw = dw @ dw", "backward raises RuntimeError: "),
        ("return x @ w + b, (x, w)", "return x @ w.T, 0", "forward raises RuntimeError: "),
        ("return torch.randn(5, SIZE)", "return undefined", "example raises NameError: "),
    ],
)
def test_an_exception_in_a_layer_gives_a_one_line_error_with_its_position(cvlab, tmp_path, old, new, message):
    (tmp_path / "mine.py").write_text(LINEAR.replace(old, new).replace("MISTAKE", "pass").replace("SIZE", "3"))
    code, _, err = cvlab("gradcheck", "./mine.py:Linear")
    assert code == 2
    assert f"./mine.py:Linear: {message}" in err
    assert "mine.py:" in err.partition("; ")[2]
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("is_static", [True, False])
def test_a_layer_may_modify_its_input_in_place_and_take_self(cvlab, tmp_path, is_static):
    text = LINEAR.replace("MISTAKE", "pass").replace("SIZE", "3")
    text = text.replace(
        "return x @ w + b, (x, w)", "copy = x.clone()\n        x *= 2\n        return x @ w + b, (copy, w)"
    )
    text = text.replace("dout @ w.T, x.T @ dout", "2 * dout @ w.T, 2 * x.T @ dout")
    if not is_static:
        text = text.replace("    @staticmethod\n", "")
        for part in ("forward(", "backward(", "example("):
            text = text.replace(f"def {part}", f"def {part}self, ").replace("self, )", "self)")
    (tmp_path / "mine.py").write_text(text)
    code, out, err = cvlab("gradcheck", "./mine.py:Linear")
    assert code == 0, out + err


def test_unknown_names_with_commas_are_quoted(cvlab):
    err = cvlab("gradcheck", "SGDx momentum")[2]
    assert "'SGD, momentum'" in err or "'deep_convnet, BatchNorm'" in err
