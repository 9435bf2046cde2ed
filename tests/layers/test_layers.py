"""Each hand-written layer against a slow reference, against autograd, and as a replacement of a torch.nn module."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.errors import ConfigError
from cvlab.experiments.classification.models.convnet import deep_convnet
from cvlab.layers import batchnorm, conv, linear, losses, modules

DOUBLE = torch.float64


def randn(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def relative_error(a, b):
    """Return max |a - b| / max(|a| + |b|), with a floor, so that gradients that should be 0 are compared absolutely."""
    return ((a - b).abs().max() / (a.abs() + b.abs()).max().clamp(min=1e-10)).item() if a.numel() else 0.0


def compare_with_autograd(layer, reference, tensors, *options):
    """Compare the output and every gradient with autograd through torch's function."""
    leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    expected_output = reference(*leaves)
    output, cache = layer.forward(*tensors, *options)
    assert output.shape == expected_output.shape
    assert relative_error(output, expected_output.detach()) < 1e-12
    dout = randn(*expected_output.shape)
    inputs = [t for t in leaves if t is not None and t.requires_grad]
    gradients = [g for g in layer.backward(dout, cache) if g is not None]
    for gradient, expected in zip(gradients, torch.autograd.grad(expected_output, inputs, dout), strict=True):
        assert gradient.shape == expected.shape
        assert relative_error(gradient, expected) < 1e-12


@pytest.mark.parametrize(("n", "d", "m"), [(5, 4, 3), (1, 1, 1), (0, 4, 3), (7, 1, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(n, d, m, bias):
    compare_with_autograd(linear.Linear, F.linear, [randn(n, d), randn(m, d), randn(m) if bias else None])


def test_relu():
    compare_with_autograd(linear.ReLU, F.relu, [randn(4, 5, 3)])
    _, cache = linear.ReLU.forward(torch.zeros(3))
    assert not linear.ReLU.backward(torch.ones(3), cache)[0].any(), "the gradient at 0 is 0"


@pytest.mark.parametrize("p", [0.0, 0.25, 0.7])
def test_dropout_keeps_the_expectation(p):
    x = torch.full((200_000,), 3.0)
    out, cache = linear.Dropout.forward(x, p)
    assert out.mean().item() == pytest.approx(3.0, rel=0.02)
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert torch.equal(linear.Dropout.backward(torch.ones_like(x), cache)[0], out / 3)


def slow_conv(x, w, b, stride, padding):
    """The convolution as seven nested loops."""
    n, _, h, width = x.shape
    f, _, k, _ = w.shape
    padded = F.pad(x, (padding,) * 4)
    ho, wo = conv.out_size(h, k, stride, padding), conv.out_size(width, k, stride, padding)
    out = torch.zeros(n, f, ho, wo, dtype=x.dtype)
    for image in range(n):
        for kernel in range(f):
            for i in range(ho):
                for j in range(wo):
                    window = padded[image, :, i * stride : i * stride + k, j * stride : j * stride + k]
                    out[image, kernel, i, j] = (window * w[kernel]).sum() + (b[kernel] if b is not None else 0)
    return out


SHAPES = [(2, 3, 7, 6, 4, 3, 1, 1), (1, 1, 3, 3, 1, 3, 1, 0), (2, 2, 8, 8, 3, 5, 2, 2), (2, 3, 5, 7, 2, 1, 1, 0)]


@pytest.mark.parametrize(("n", "c", "h", "w", "f", "k", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_conv(n, c, h, w, f, k, stride, padding, bias):
    tensors = [randn(n, c, h, w), randn(f, c, k, k), randn(f) if bias else None]
    output, _ = conv.Conv2d.forward(*tensors, stride, padding)
    assert relative_error(output, slow_conv(*tensors, stride, padding)) < 1e-10
    compare_with_autograd(conv.Conv2d, lambda x, v, b: F.conv2d(x, v, b, stride, padding), tensors, stride, padding)


def test_conv_takes_any_memory_format_and_an_empty_batch():
    x, w, b = randn(2, 3, 6, 6), randn(4, 3, 3, 3), randn(4)
    contiguous, _ = conv.Conv2d.forward(x, w, b, 1, 1)
    channels_last, _ = conv.Conv2d.forward(x.to(memory_format=torch.channels_last), w, b, 1, 1)
    assert torch.equal(contiguous, channels_last)
    assert contiguous.is_contiguous(memory_format=torch.channels_last)
    compare_with_autograd(conv.Conv2d, lambda *t: F.conv2d(*t, padding=1), [randn(0, 3, 6, 6), w, b], 1, 1)


def test_fold_is_the_adjoint_of_unfold():
    x = randn(2, 3, 7, 8)
    patches = conv.unfold(x, 3, 2, 1)
    other = randn(*patches.shape)
    folded = conv.fold(other, x.shape, 3, 2, 1)
    assert (patches * other).sum().item() == pytest.approx((x * folded).sum().item(), rel=1e-12)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(6, 2, 2), (7, 2, 2), (7, 3, 2), (6, 3, 1)])
def test_max_pool(size, kernel, stride):
    compare_with_autograd(
        conv.MaxPool2d, lambda x: F.max_pool2d(x, kernel, stride), [randn(2, 3, size, size)], kernel, stride
    )


def test_max_pool_ties_go_to_the_first_element_as_in_torch():
    x = torch.zeros(1, 1, 4, 4, dtype=DOUBLE)
    compare_with_autograd(conv.MaxPool2d, lambda t: F.max_pool2d(t, 2), [x], 2)


def slow_batchnorm(x, gamma, beta, eps=1e-5):
    out = torch.empty_like(x)
    for column in range(x.shape[1]):
        values = x[:, column]
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
        out[:, column] = gamma[column] * (values - mean) / (var + eps) ** 0.5 + beta[column]
    return out


@pytest.mark.parametrize("layer", [batchnorm.BatchNorm, batchnorm.BatchNormAlt])
@pytest.mark.parametrize(("n", "d"), [(6, 4), (3, 1), (50, 3)])
def test_batchnorm(layer, n, d):
    tensors = [3 * randn(n, d) + 10, randn(d), randn(d)]
    assert relative_error(layer.forward(*tensors)[0], slow_batchnorm(*tensors)) < 1e-10
    compare_with_autograd(layer, lambda x, g, b: F.batch_norm(x, None, None, g, b, True), tensors)


def test_both_batchnorm_derivations_agree():
    x, gamma, beta, dout = randn(20, 5), randn(5), randn(5), randn(20, 5)
    cache = batchnorm.BatchNorm.forward(x, gamma, beta)[1]
    pairs = zip(batchnorm.BatchNorm.backward(dout, cache), batchnorm.BatchNormAlt.backward(dout, cache), strict=True)
    assert all(relative_error(gradient, alternative) < 1e-12 for gradient, alternative in pairs)


@pytest.mark.parametrize("layer", [batchnorm.SpatialBatchNorm, batchnorm.SpatialBatchNormAlt])
def test_spatial_batchnorm(layer):
    tensors = [randn(3, 4, 5, 2), randn(4), randn(4)]
    compare_with_autograd(layer, lambda x, g, b: F.batch_norm(x, None, None, g, b, True), tensors)


def loss_gradient(layer, scores, labels):
    value, cache = layer.forward(scores, labels)
    return value, layer.backward(torch.tensor(1.0, dtype=DOUBLE), cache)[0]


def test_softmax_loss():
    scores, labels = (100 * randn(6, 5)).requires_grad_(), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = F.cross_entropy(scores, labels)
    value, gradient = loss_gradient(losses.Softmax, scores.detach(), labels)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(gradient, torch.autograd.grad(expected, scores)[0]) < 1e-12
    start, _ = loss_gradient(losses.Softmax, torch.zeros(4, 10, dtype=DOUBLE), torch.arange(4))
    assert start.item() == pytest.approx(2.302585, abs=1e-6)


def test_svm_loss():
    scores, labels = randn(6, 5).requires_grad_(), torch.tensor([0, 4, 2, 2, 1, 3])
    values = scores.tolist()
    slow = sum(max(0.0, values[i][j] - values[i][labels[i]] + 1) for i in range(6) for j in range(5) if j != labels[i])
    value, gradient = loss_gradient(losses.SVM, scores.detach(), labels)
    assert value.item() == pytest.approx(slow / 6, rel=1e-12)
    expected = F.multi_margin_loss(scores, labels, reduction="sum") * 5 / 6  # torch divides by the number of classes
    assert relative_error(gradient, torch.autograd.grad(expected, scores)[0]) < 1e-12


MODULES = [
    ("Linear", (6, 4), (3, 6)),
    ("ReLU", (), (3, 6)),
    ("Conv2d", (3, 5, 3, 1, 1), (2, 3, 6, 6)),
    ("MaxPool2d", (2,), (2, 3, 6, 6)),
    ("BatchNorm1d", (6,), (9, 6)),
    ("BatchNorm2d", (3,), (4, 3, 5, 5)),
]


@pytest.mark.parametrize("namespace", [modules.MANUAL_LAYERS, modules.MANUAL_ALT_LAYERS])
@pytest.mark.parametrize(("name", "arguments", "shape"), MODULES)
def test_a_module_replaces_that_of_torch(namespace, name, arguments, shape):
    torch.manual_seed(0)
    expected_module = getattr(nn, name)(*arguments).double()
    module = getattr(namespace, name)(*arguments).double()
    module.load_state_dict(expected_module.state_dict())
    x = randn(*shape)
    expected_x, actual_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = expected_module(expected_x), module(actual_x)
    dout = randn(*expected.shape)
    expected.backward(dout)
    actual.backward(dout)
    assert relative_error(expected.detach(), actual.detach()) < 1e-12
    assert relative_error(expected_x.grad, actual_x.grad) < 1e-12
    for p, q in zip(expected_module.parameters(), module.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-12
    for p, q in zip(expected_module.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert relative_error(expected_module.eval()(x), module.eval()(x)) < 1e-12


def test_dropout_module():
    dropout = modules.MANUAL_LAYERS.Dropout(0.5)
    x = torch.ones(1000, requires_grad=True)
    out = dropout(x)
    out.sum().backward()
    assert torch.equal(x.grad, out)
    assert 350 < (out == 0).sum() < 650
    assert dropout.eval()(x) is x


CURVE = (
    "precision=float64 duration.steps=20 log_every=1 batch_size=5 data.num_train=100 data.val_fraction=0.004 "
    "evaluate_test=false"
)


def test_the_layers_setting_changes_the_layers_and_nothing_else(cvlab, tmp_path):

    from cvlab.runs import run_dir
    from cvlab.runs.records import read_metrics

    curves, runs = {}, {}
    for name in ("torch", "manual", "manual_alt"):
        options = CURVE.split()
        code, out, err = cvlab("train", "cifar_bn", f"layers={name}", *options, "expect_fallback=[]", "--json", "-q")
        assert code == 0, err
        runs[name] = run_dir.Path(json.loads(out)["run"])
        curves[name] = [row["train_loss"] for row in read_metrics(runs[name]) if "train_loss" in row]
    assert len(curves["torch"]) == 20
    for name in ("manual", "manual_alt"):
        assert curves[name] == pytest.approx(curves["torch"], abs=1e-9), "1e-4 is required"
    from cvlab.runs import checkpoint

    states = [checkpoint.load_latest(run / "checkpoints", print)[1]["model"] for run in runs.values()]
    assert states[0].keys() == states[1].keys() == states[2].keys()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda layers: layers.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (lambda layers: layers.Conv2d(4, 4, (3, 1)), r"kernel_size \(3, 1\)"),
        (lambda layers: layers.Conv2d(4, 4, 3, stride=(1, 2)), r"stride \(1, 2\)"),
        (lambda layers: layers.Conv2d(4, 4, 3, padding="same"), "padding same"),
        (lambda layers: layers.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (lambda layers: layers.MaxPool2d(2, padding=1), "padding=1"),
        (lambda layers: layers.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (lambda layers: layers.BatchNorm2d(4, affine=False), "affine=False"),
        (lambda layers: layers.BatchNorm2d(4, momentum=None), "momentum=None"),
    ],
)
def test_unsupported_options_are_rejected(build, message):
    with pytest.raises(ConfigError, match=message):
        build(modules.MANUAL_LAYERS)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": (1, 1)}, {"bias": False}, {"stride": (2, 2)}])
def test_conv_modules_with_options(options):
    module, expected = modules.MANUAL_LAYERS.Conv2d(3, 5, 3, **options).double(), nn.Conv2d(3, 5, 3, **options).double()
    expected.load_state_dict(module.state_dict())
    x = randn(2, 3, 9, 9)
    torch.testing.assert_close(module(x), expected(x))
    torch.testing.assert_close(modules.MANUAL_LAYERS.MaxPool2d(3, stride=1)(x), nn.MaxPool2d(3, stride=1)(x))


def test_layers_work_under_autocast():
    models = []
    for layers in (nn, modules.MANUAL_LAYERS, modules.MANUAL_ALT_LAYERS):
        torch.manual_seed(0)
        models.append(deep_convnet(filters=(4, 8), pools=(0,), batchnorm=True, image_size=8, layers=layers))
    x = torch.randn(6, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = [model(x) for model in models]
    for model, output in zip(models, scores, strict=True):
        output.float().square().sum().backward()
        torch.testing.assert_close(output.float(), scores[0].float(), rtol=0.1, atol=0.1)
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_one_value_per_channel_is_rejected_as_in_torch():
    with pytest.raises(ConfigError, match="more than one value per channel"):
        modules.MANUAL_LAYERS.BatchNorm1d(3)(torch.randn(1, 3))


def test_dropout_with_probability_one():
    out, cache = linear.Dropout.forward(torch.ones(5), 1.0)
    assert not out.any()
    assert not linear.Dropout.backward(torch.ones(5), cache)[0].any()
