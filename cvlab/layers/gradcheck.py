"""Gradients of hand-written layers against centered differences and against autograd, in float64.

The upstream gradient is random: with all ones BatchNorm's dx vanishes, and much would pass that is wrong. Errors are
max |a - b| / max(|a| + |b|), with a floor, so that a gradient which should be 0 is compared absolutely.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.layers import batchnorm, conv, linear, losses
from cvlab.layers import reference as layers_reference

STEPS = (1e-5, 1e-7)  # the second where the first misses: a kink (ReLU at 0, a tie in pooling) may lie within it
FLOOR = 1e-10
MODEL_FLOOR = 1e-3  # the bias of a convolution before BatchNorm has gradient 0: there differences show rounding only
MODEL_TOLERANCE = 1e-5
TORCH_TOLERANCE = 1e-12


@dataclass(frozen=True)
class GradCheckCase:
    """One layer on one set of inputs.

    `forward(*inputs) -> (out, cache)` and `backward(dout, cache) -> gradients`, one for each input that is a floating
    point tensor, in order; `reference(*inputs) -> out` is the same function for autograd.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    reference: Callable[..., Tensor]
    tolerance: float


@dataclass(frozen=True)
class GradCheckResult:
    """The largest errors over all inputs of a case, against differences and against torch; None: not compared."""

    name: str
    numeric_error: float | None
    torch_error: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within their tolerances; nan is not."""
        bounds = ((self.numeric_error, self.tolerance), (self.torch_error, TORCH_TOLERANCE))
        return all(error <= bound for error, bound in bounds if error is not None)


def relative_error(a: Tensor, b: Tensor, floor: float = FLOOR) -> float:
    """Return max |a - b| / max(|a| + |b|), the divisor at least `floor`; inf where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    return ((a - b).abs().max() / (a.abs() + b.abs()).max().clamp(min=floor)).item()


def numeric_gradient(function: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor, step: float = STEPS[0]) -> Tensor:
    """Return d sum(function(x) * dout) / dx by centered differences, one element after the other."""
    x = x.clone(memory_format=torch.contiguous_format)
    gradient = torch.zeros_like(x)
    flat, result = x.view(-1), gradient.view(-1)
    for k in range(flat.numel()):
        value = flat[k].item()
        flat[k] = value + step
        above = function(x)
        flat[k] = value - step
        below = function(x)
        flat[k] = value
        result[k] = ((above - below) * dout).sum() / (2 * step)
    return gradient


def numeric_error(
    gradient: Tensor,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    dout: Tensor,
    tolerance: float,
    floor: float = FLOOR,
) -> float:
    """Return the relative error of a gradient against differences, with a smaller step where the first one misses."""
    found = float("inf")
    for step in STEPS:
        found = min(relative_error(gradient, numeric_gradient(function, x, dout, step), floor), found)
        if found <= tolerance:
            break
    return found


def check(case: GradCheckCase) -> GradCheckResult:
    """Compare a case's gradients with both oracles. ConfigError where a user's layer does not have their form."""
    found = case.forward(*case.inputs)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor):
        raise ConfigError(f"{case.name}: forward must return (out, cache), out a tensor")
    out, cache = found
    dout = torch.randn_like(out)
    floating = [k for k, x in enumerate(case.inputs) if x.is_floating_point()]
    given = case.backward(dout, cache)
    if not isinstance(given, (tuple, list)) or not all(g is None or isinstance(g, Tensor) for g in given):
        raise ConfigError(f"{case.name}: backward must return a tuple of tensors, one for each floating-point input")
    mine = [gradient for gradient in given if gradient is not None]
    if len(mine) != len(floating):
        raise ConfigError(f"{case.name}: backward gives {len(mine)} gradients for {len(floating)} inputs")
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in case.inputs]
    theirs = _autograd(case, leaves, [leaves[k] for k in floating], dout)
    numeric = against_torch = 0.0
    for place, k in enumerate(floating):

        def vary(x: Tensor, k: int = k) -> Tensor:
            changed: Tensor = case.forward(*case.inputs[:k], x, *case.inputs[k + 1 :])[0]
            return changed

        numeric = _worse(numeric, numeric_error(mine[place], vary, case.inputs[k], dout, case.tolerance))
        against_torch = _worse(against_torch, relative_error(mine[place], theirs[place]))
    return GradCheckResult(case.name, numeric, against_torch, case.tolerance)


def _autograd(case: GradCheckCase, inputs: Sequence[Tensor], wanted: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """Return autograd's gradients; zero for an input that the output does not depend on."""
    out = case.reference(*inputs)
    if not out.requires_grad:
        raise ConfigError(f"{case.name}: autograd cannot follow forward", "leave no_grad and detach out of it")
    found = torch.autograd.grad(out, wanted, dout, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]


def _worse(a: float, b: float) -> float:
    return b if b != b or b > a else a  # nan is worst


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _away_from_zero(*shape: int) -> Tensor:
    """Return random numbers that no difference carries over the kink of a ReLU."""
    x = _randn(*shape)
    return x + 0.01 * x.sign()


def _layer(
    name: str, layer: Any, inputs: Sequence[Tensor], reference: Any, tolerance: float, *options: Any
) -> GradCheckCase:
    return GradCheckCase(
        name, lambda *x: layer.forward(*x, *options), layer.backward, tuple(inputs), reference, tolerance
    )


class _LinearReLU:
    """Linear, then ReLU: caches and gradients passed on by hand."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Any]:
        middle, first = linear.Linear.forward(x, w, b)
        out, second = linear.ReLU.forward(middle)
        return out, (first, second)

    @staticmethod
    def backward(dout: Tensor, cache: Any) -> Any:
        (dmiddle,) = linear.ReLU.backward(dout, cache[1])
        return linear.Linear.backward(dmiddle, cache[0])


class _SeededDropout:
    """Dropout whose mask is the same in every call, so that differences make sense."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return linear.Dropout.forward(x, 0.4)

    backward = linear.Dropout.backward

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return x * (torch.rand(x.shape) >= 0.4).to(x.dtype) / 0.6


def _multi_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the SVM loss: torch divides it by the number of classes too."""
    return F.multi_margin_loss(scores, labels) * scores.shape[1]


def cases() -> list[GradCheckCase]:
    """Return every hand-written layer and loss, on random inputs."""
    labels = torch.tensor([1, 0, 4, 2])
    picture, statistics = _randn(2, 3, 6, 5), (1 + 0.3 * _randn(3), _randn(3))

    def normalized(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, gamma, beta, training=True)

    found = [
        _layer("Linear", linear.Linear, [_randn(4, 6), _randn(5, 6), _randn(5)], F.linear, 1e-7),
        _layer("ReLU", linear.ReLU, [_away_from_zero(4, 6)], F.relu, 1e-8),
        _layer(
            "Linear-ReLU",
            _LinearReLU,
            [_randn(4, 6), _randn(5, 6), _randn(5)],
            lambda x, w, b: F.relu(F.linear(x, w, b)),
            1e-8,
        ),
        _layer("Dropout", _SeededDropout, [_randn(5, 7)], _SeededDropout.reference, 1e-8),
        _layer(
            "Conv2d",
            conv.Conv2d,
            [picture, _randn(4, 3, 3, 3), _randn(4)],
            lambda x, w, b: F.conv2d(x, w, b, 2, 1),
            1e-8,
            2,
            1,
        ),
        _layer("MaxPool2d", conv.MaxPool2d, [_randn(2, 3, 6, 6)], lambda x: F.max_pool2d(x, 2), 1e-10, 2),
        _layer("Softmax", losses.Softmax, [_randn(4, 5), labels], F.cross_entropy, 1e-6),
        _layer("SVM", losses.SVM, [_randn(4, 5), labels], _multi_margin, 1e-7),
    ]
    for name, tolerance, layer, x in (
        ("BatchNorm", 1e-9, batchnorm.BatchNorm, _randn(7, 3)),
        ("BatchNorm, simplified", 1e-9, batchnorm.BatchNormAlt, _randn(7, 3)),
        ("SpatialBatchNorm", 1e-6, batchnorm.SpatialBatchNorm, picture),
        ("SpatialBatchNorm, simplified", 1e-6, batchnorm.SpatialBatchNormAlt, picture),
    ):
        found.append(_layer(name, layer, [x, *statistics], normalized, tolerance))
    for name, layer, inputs, reference, tolerance, options in layers_reference.examples():
        found.append(_layer(name, layer, inputs, reference, tolerance, *options))
    return found


def check_model(name: str, mine: nn.Module, theirs: nn.Module, images: Tensor, labels: Tensor) -> GradCheckResult:
    """Compare the gradients of all weights of a net of hand-written layers, through the softmax loss.

    `theirs` is the same net of torch's layers; both are put to float64 and get the same weights.
    """
    mine, theirs = mine.double().train(), theirs.double().train()
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.ndim == 1:  # with biases of 0 a unit below which all are dead would stand exactly on its kink
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.load_state_dict(mine.state_dict())
    theirs.zero_grad()
    F.cross_entropy(theirs(images), labels).backward()
    value, cache = losses.Softmax.forward(scores := mine(images), labels)
    dscores, _ = losses.Softmax.backward(torch.ones_like(value), cache)
    scores.backward(dscores.detach())
    one = torch.ones_like(value)
    numeric = against_torch = 0.0
    for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None

        def loss(values: Tensor, own: Tensor = own) -> Tensor:
            before, own.data = own.data, values
            with torch.no_grad():
                found = losses.Softmax.forward(mine(images), labels)[0]
            own.data = before
            return found

        numeric = _worse(numeric, numeric_error(own.grad, loss, own.data, one, MODEL_TOLERANCE, MODEL_FLOOR))
        against_torch = _worse(against_torch, relative_error(own.grad, other.grad, MODEL_FLOOR))
    return GradCheckResult(name, numeric, against_torch, MODEL_TOLERANCE)


def user_case(name: str, layer: Any) -> GradCheckCase:
    """Make a case of a user's layer: static `forward`, `backward` and `example() -> inputs` (float64 tensors).

    Autograd goes through its own forward. ConfigError where one of the three is missing.
    """
    missing = [part for part in ("forward", "backward", "example") if not callable(getattr(layer, part, None))]
    if missing:
        raise ConfigError(f"{name}: has no {', '.join(missing)}", "see `class Linear` in cvlab/layers/linear.py")
    example = layer.example()
    if not isinstance(example, (tuple, list)) or not example or not all(isinstance(x, Tensor) for x in example):
        raise ConfigError(f"{name}: example must return a tuple of tensors")
    inputs = tuple(x.double() if x.is_floating_point() else x for x in example)
    return GradCheckCase(name, layer.forward, layer.backward, inputs, lambda *x: layer.forward(*x)[0], 1e-6)
