"""Check the gradients of hand-written layers against central differences and against autograd, in float64.

The upstream gradient is random: with all ones BatchNorm's dx vanishes, and many wrong gradients would pass. Errors are
max |a - b| / max(|a| + |b|), with a floor, so that a gradient that should be 0 is compared absolutely.
"""

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.errors import ConfigError, CvlabError
from cvlab.layers import losses

STEPS = (1e-5, 1e-7)  # the second where the first misses: a kink (ReLU at 0, a tie in pooling) may lie within it
FLOOR = 1e-10
MODEL_FLOOR = 1e-3  # the bias of a convolution before BatchNorm has gradient 0: there differences show rounding only
MODEL_TOLERANCE = 1e-5
TORCH_TOLERANCE = 1e-12
CONTRACT = "a layer has forward(*inputs) -> (out, cache), backward(dout, cache) -> gradients, example() -> inputs"


@dataclass(frozen=True)
class GradCheckCase:
    """One layer on one set of inputs.

    Attributes:
        name: What the check is called.
        forward: `forward(*inputs) -> (out, cache)`.
        backward: `backward(dout, cache) -> gradients`, one for each floating-point input, in order.
        inputs: The arguments of `forward`.
        reference: `reference(*inputs) -> out`, the same function for autograd.
        tolerance: The largest error against differences.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    reference: Callable[..., Tensor]
    tolerance: float


@dataclass(frozen=True)
class GradientError:
    """One wrong gradient of a case.

    Attributes:
        name: `d` and the name of the input, for example `dw`.
        problem: What is wrong, and the usual cause.
        position: Index of the element with the largest error; None if the shapes differ.
        value: That element of the gradient.
        expected: What autograd gives.
        numeric: What differences give.
    """

    name: str
    problem: str
    position: tuple[int, ...] | None = None
    value: float | None = None
    expected: float | None = None
    numeric: float | None = None


@dataclass(frozen=True)
class GradCheckResult:
    """The largest errors over all inputs of a case, against differences and autograd; None if not compared."""

    name: str
    numeric_error: float | None
    torch_error: float | None
    tolerance: float
    wrong_gradients: tuple[GradientError, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether both errors are within their tolerances; NaN is not."""
        bounds = ((self.numeric_error, self.tolerance), (self.torch_error, TORCH_TOLERANCE))
        return all(error <= bound for error, bound in bounds if error is not None)


def relative_error(a: Tensor, b: Tensor, floor: float = FLOOR) -> float:
    """Return max |a - b| / max(|a| + |b|) of two tensors, the divisor at least `floor`; inf if their shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    return ((a - b).abs().max() / (a.abs() + b.abs()).max().clamp(min=floor)).item()


def numeric_gradient(function: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor, step: float = STEPS[0]) -> Tensor:
    """Return the gradient of sum(function(x) * dout) by central differences, one element after the other.

    Args:
        function: Maps a tensor of the shape of x to one of the shape of dout.
        x: Where to differentiate, float64, any shape.
        dout: Upstream gradient.
        step: Step of the differences.

    Returns:
        gradient, of the shape of x.
    """
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
    """Return the relative error of a gradient against differences, with a smaller step if the first one fails.

    Args:
        gradient: What to check, of the shape of x.
        function: Maps a tensor of the shape of x to one of the shape of dout.
        x: Where to differentiate, float64, any shape.
        dout: Upstream gradient.
        tolerance: The error that is small enough.
        floor: Smallest divisor of the error.

    Returns:
        the smallest error over `STEPS`.
    """
    error = float("inf")
    for step in STEPS:
        error = min(relative_error(gradient, numeric_gradient(function, x, dout, step), floor), error)
        if error <= tolerance:
            break
    return error


def check(case: GradCheckCase) -> GradCheckResult:
    """Compare a case's gradients with differences and with autograd.

    Args:
        case: The layer and its inputs.

    Returns:
        The largest errors, and what is wrong with each gradient that is wrong.

    Raises:
        ConfigError: forward or backward of a user's layer fail, or return something else than they should.
    """
    result = _call(case.name, "forward", case.forward, *_clones(case.inputs))
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
        raise ConfigError(f"{case.name}: forward must return (out, cache), out a tensor")
    out, cache = result
    dout = torch.randn_like(out)
    floating = [k for k, x in enumerate(case.inputs) if x.is_floating_point()]
    result = _call(case.name, "backward", case.backward, dout.clone(), cache)
    if not isinstance(result, (tuple, list)) or not all(g is None or isinstance(g, Tensor) for g in result):
        raise ConfigError(f"{case.name}: backward must return a tuple of tensors, one for each floating-point input")
    gradients = [gradient for gradient in result if gradient is not None]
    if len(gradients) != len(floating):
        raise ConfigError(f"{case.name}: backward gives {len(gradients)} gradients for {len(floating)} inputs")
    expected = _autograd(case, dout)
    names = [f"d{name}" for name in _input_names(case)]
    numeric = against_torch = 0.0
    wrong = []
    for gradient, reference, k in zip(gradients, expected, floating, strict=True):

        def vary(x: Tensor, k: int = k) -> Tensor:
            inputs = _clones(case.inputs)
            out_k: Tensor = case.forward(*inputs[:k], x.clone(), *inputs[k + 1 :])[0]
            return out_k

        by_differences = numeric_error(gradient, vary, case.inputs[k], dout, case.tolerance)
        by_autograd = relative_error(gradient, reference)
        numeric, against_torch = _max_or_nan(numeric, by_differences), _max_or_nan(against_torch, by_autograd)
        if not (by_differences <= case.tolerance and by_autograd <= TORCH_TOLERANCE):
            wrong.append(_describe(case, names[k], gradient, expected, floating.index(k), dout, vary))
    return GradCheckResult(case.name, numeric, against_torch, case.tolerance, tuple(wrong))


def _clones(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of inputs: a layer may change them in place."""
    return [x.clone() for x in inputs]


def _call(name: str, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a part of a layer. ConfigError, with the line, if it raises an exception."""
    try:
        return function(*arguments)
    except CvlabError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{name}: {part} raises {type(error).__name__}: {error}"
        raise ConfigError(message, f"{frame.filename}:{frame.lineno}, {frame.line}") from error


def _input_names(case: GradCheckCase) -> list[str]:
    """Return the names of the parameters of forward, `x0`, `x1`, ... where it has none."""
    count = len(case.inputs)
    try:
        parameters = inspect.signature(case.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[k] if k < len(names) else f"x{k}" for k in range(count)]


def _describe(
    case: GradCheckCase,
    name: str,
    gradient: Tensor,
    expected: Sequence[Tensor],
    index: int,
    dout: Tensor,
    vary: Callable[[Tensor], Tensor],
) -> GradientError:
    """Describe a wrong gradient: number `index` of those of the floating-point inputs."""
    reference = expected[index]
    if gradient.shape != reference.shape:
        transposed = gradient.ndim == 2 and _is_close(gradient.T, reference)
        hint = "; it is the transpose of what it should be" if transposed else ""
        return GradientError(name, f"has the shape {tuple(gradient.shape)}, not {tuple(reference.shape)}{hint}")
    difference = (gradient - reference).abs().nan_to_num(nan=float("inf"))
    position = tuple(int(k) for k in torch.unravel_index(difference.argmax(), difference.shape))
    x = [x for x in case.inputs if x.is_floating_point()][index]
    numeric = numeric_gradient(vary, x, dout)[position].item()
    problem = _diagnose(case, gradient, reference, index, dout)
    return GradientError(name, problem, position, gradient[position].item(), reference[position].item(), numeric)


def _diagnose(case: GradCheckCase, gradient: Tensor, reference: Tensor, index: int, dout: Tensor) -> str:
    """Name the usual mistake that turns the right gradient into this one."""
    if not gradient.isfinite().all():
        return "is not finite"
    if not gradient.any():
        return "is 0 everywhere"
    if gradient.ndim == 2 and gradient.shape[0] == gradient.shape[1] and _is_close(gradient.T, reference):
        return "is the transpose of what it should be"
    ratio = float((gradient * reference).sum() / reference.square().sum().clamp(min=1e-300))
    if _is_close(gradient, ratio * reference):
        return f"is {ratio:.6g} times what it should be{_ratio_hint(ratio, dout.shape[0] if dout.ndim else 1)}"
    for sample, word in ((0, "first"), (-1, "last")) if dout.ndim else ():
        of_one = torch.zeros_like(dout)
        of_one[sample] = dout[sample]
        if dout.shape[0] > 1 and _is_close(gradient, _autograd(case, of_one)[index]):
            return f"is that of the {word} sample only; add up the gradients of all samples, with += in a loop"
    wrong = (gradient - reference).abs() > 1e-6 * reference.abs().max()
    share = float(wrong.double().mean())
    return "differs from what it should be" if share == 1 else f"differs in {share:.0%} of its elements"


def _ratio_hint(ratio: float, batch_size: int) -> str:
    if abs(ratio + 1) < 1e-6:
        return "; the sign is wrong"
    for factor, word in ((batch_size, "divide by the batch size"), (1 / batch_size, "do not divide by the batch size")):
        if batch_size > 1 and abs(ratio / factor - 1) < 1e-6:
            return f"; {word} ({batch_size})"
    return "; a constant factor is missing or too many" if ratio > 0 else "; the sign and a constant factor are wrong"


def _is_close(a: Tensor, b: Tensor) -> bool:
    return relative_error(a, b) <= 1e-6


def _autograd(case: GradCheckCase, dout: Tensor) -> list[Tensor]:
    """Return autograd's gradients of the floating-point inputs; zero for one that the output does not depend on."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in case.inputs]
    leaves = [x for x in inputs if x.requires_grad]
    # a leaf may not be changed in place, as a layer may do
    out = case.reference(*(x.clone() if x.requires_grad else x for x in inputs))
    if not out.requires_grad:
        raise ConfigError(f"{case.name}: autograd cannot follow forward", "leave no_grad and detach out of it")
    gradients = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def _max_or_nan(a: float, b: float) -> float:
    """Return the larger error, NaN if b is."""
    return b if b != b or b > a else a


def check_model(name: str, model: nn.Module, reference: nn.Module, images: Tensor, labels: Tensor) -> GradCheckResult:
    """Compare the gradients of all weights of a model of hand-written layers, through the softmax loss.

    Args:
        name: What the check is called.
        model: Made of hand-written layers; becomes float64.
        reference: The same model made of torch's layers; becomes float64 and gets the model's weights.
        images: float64 (N, C, H, W).
        labels: int64 (N,).

    Returns:
        The largest errors over all weights.
    """
    model, reference = model.double().train(), reference.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # with a bias of 0, a unit whose inputs are all dead would lie exactly at its kink
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference.load_state_dict(model.state_dict())
    reference.zero_grad()
    F.cross_entropy(reference(images), labels).backward()
    value, cache = losses.Softmax.forward(logits := model(images), labels)
    dlogits, _ = losses.Softmax.backward(torch.ones_like(value), cache)
    logits.backward(dlogits.detach())
    one = torch.ones_like(value)
    numeric = against_torch = 0.0
    for parameter, reference_parameter in zip(model.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert reference_parameter.grad is not None

        def loss(values: Tensor, parameter: nn.Parameter = parameter) -> Tensor:
            saved, parameter.data = parameter.data, values
            with torch.no_grad():
                value = losses.Softmax.forward(model(images), labels)[0]
            parameter.data = saved
            return value

        numeric = _max_or_nan(
            numeric, numeric_error(parameter.grad, loss, parameter.data, one, MODEL_TOLERANCE, MODEL_FLOOR)
        )
        against_torch = _max_or_nan(
            against_torch, relative_error(parameter.grad, reference_parameter.grad, MODEL_FLOOR)
        )
    return GradCheckResult(name, numeric, against_torch, MODEL_TOLERANCE)


def user_case(name: str, layer: Any) -> GradCheckCase:
    """Make a case of a user's layer; autograd differentiates its forward.

    Args:
        name: What the check is called.
        layer: Has static `forward`, `backward` and `example() -> inputs`, a tuple of tensors.

    Returns:
        The case, in float64.

    Raises:
        ConfigError: one of the three is missing, or the example is no tuple of tensors.
    """
    missing = [part for part in ("forward", "backward", "example") if not callable(getattr(layer, part, None))]
    if missing:
        raise ConfigError(f"{name}: has no {', '.join(missing)}", CONTRACT)
    is_static = isinstance(inspect.getattr_static(layer, "forward"), (staticmethod, classmethod))
    if inspect.isclass(layer) and not is_static:
        layer = _call(name, "the constructor", layer)
    example = _call(name, "example", layer.example)
    if not isinstance(example, (tuple, list)) or not example or not all(isinstance(x, Tensor) for x in example):
        raise ConfigError(f"{name}: example must return a tuple of tensors")
    inputs = tuple(x.double() if x.is_floating_point() else x for x in example)
    return GradCheckCase(name, layer.forward, layer.backward, inputs, lambda *x: layer.forward(*x)[0], 1e-6)
