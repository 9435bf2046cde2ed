"""The hand-written layers as modules, with torch.nn's constructors and state_dict names.

One `autograd.Function` runs them all. A model built from `MANUAL_LAYERS` or `MANUAL_ALT_LAYERS` (the other
derivation of BatchNorm's backward) reads and writes the same checkpoints as one built from torch.nn.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.layers import batchnorm, conv, linear

CacheCallback = Callable[[Any], None]


class _ManualFunction(torch.autograd.Function):
    """Run a layer's own forward and backward, with nothing of autograd in between."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, options: tuple[Any, ...], on_cache: CacheCallback | None, *tensors: Tensor | None
    ) -> Tensor:
        out, cache = layer.forward(*tensors, *options)
        if on_cache is not None:
            on_cache(cache)
        ctx.layer, ctx.cache, ctx.num_tensors = layer, cache, len(tensors)
        result: Tensor = out
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.layer.backward(dout, ctx.cache)
        return (None, None, None, *grads, *([None] * (ctx.num_tensors - len(grads))))


def apply_layer(
    layer: Any, *tensors: Tensor | None, options: tuple[Any, ...] = (), on_cache: CacheCallback | None = None
) -> Tensor:
    """Run a layer on tensors so that autograd calls its own backward.

    There is no autocast inside: a layer computes in the dtype of its weights.

    Args:
        layer: A class with static `forward` and `backward`.
        tensors: Its inputs; the second, if it is floating point, gives the dtype of the first.
        options: Arguments of `forward` that follow the tensors.
        on_cache: Called with the cache of `forward`.

    Returns:
        The layer's output.
    """
    with torch.autocast(tensors[0].device.type, enabled=False):  # type: ignore[union-attr]
        if len(tensors) > 1:  # weights are float32 or float64; a layer below may have given bfloat16
            weight = tensors[1]
            assert tensors[0] is not None
            assert weight is not None
            if weight.is_floating_point():
                tensors = (tensors[0].to(weight.dtype), *tensors[1:])
        out: Tensor = _ManualFunction.apply(layer, options, on_cache, *tensors)  # type: ignore[no-untyped-call]
    return out


def _single_value(layer: nn.Module, name: str) -> int:
    """Return an option that must have one value for both directions; raise ConfigError if it has two."""
    value: Any = getattr(layer, name)
    first, second = value if isinstance(value, tuple) else (value, value)
    if first != second or not isinstance(first, int):
        raise ConfigError(f"hand-written {type(layer).__name__}: {name} {value}: only one number for both directions")
    return first


def _require_options(layer: nn.Module, **expected: Any) -> None:
    """Raise ConfigError if a layer has an option that is not implemented."""
    for name, value in expected.items():
        if (actual := getattr(layer, name)) != value:
            raise ConfigError(
                f"hand-written {type(layer).__name__}: {name}={actual} is not implemented, only {name}={value}",
                "use layers: torch",
            )


class Linear(nn.Linear):
    """`torch.nn.Linear`, hand-written."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, D) to (N, M)."""
        return apply_layer(linear.Linear, x, self.weight, self.bias)


class ReLU(nn.ReLU):
    """`torch.nn.ReLU`, hand-written."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape elementwise."""
        return apply_layer(linear.ReLU, x)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, hand-written: zeroes in training, does nothing in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape elementwise."""
        return apply_layer(linear.Dropout, x, options=(self.p,)) if self.training else x


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, hand-written, with square kernels, one stride and one padding; else ConfigError."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _require_options(self, groups=1, dilation=(1, 1), padding_mode="zeros")
        _single_value(self, "kernel_size")
        self.op_options = (_single_value(self, "stride"), _single_value(self, "padding"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, F, Ho, Wo)."""
        return apply_layer(conv.Conv2d, x, self.weight, self.bias, options=self.op_options)


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`, hand-written, with square windows; ConfigError for anything else."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _require_options(self, padding=0, dilation=1, ceil_mode=False, return_indices=False)
        self.op_options = (_single_value(self, "kernel_size"), _single_value(self, "stride"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, Ho, Wo)."""
        return apply_layer(conv.MaxPool2d, x, options=self.op_options)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Base of the variants: batch statistics in training, which also update the running ones as in torch.nn."""

    layer: Any
    dimensions: int

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _require_options(self, affine=True, track_running_stats=True)
        if self.momentum is None:
            message = f"hand-written {type(self).__name__}: momentum=None is not implemented"
            raise ConfigError(message, "use layers: torch")

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim == self.dimensions, input.shape

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel of (N, C) or (N, C, H, W)."""
        self._check_input_dim(x)
        if self.training:
            return apply_layer(
                self.layer, x, self.weight, self.bias, options=(self.eps,), on_cache=self._update_statistics
            )
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = (1, -1, *([1] * (x.ndim - 2)))
        gamma, beta, mean, var = (t.view(shape) for t in (self.weight, self.bias, self.running_mean, self.running_var))
        return batchnorm.BatchNorm.normalize(x, gamma, beta, mean, var, self.eps)

    def _update_statistics(self, cache: batchnorm.BatchNorm.Cache) -> None:
        """Update the running statistics: running = (1 - momentum) running + momentum batch, the variance unbiased."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        n = cache.centered.shape[0]
        if n < 2:
            raise ConfigError("BatchNorm needs more than one value per channel in training", "raise batch_size")
        self.running_mean.lerp_(cache.mean, self.momentum)
        self.running_var.lerp_(cache.var * (n / (n - 1)), self.momentum)
        self.num_batches_tracked.add_(1)


class BatchNorm1d(_BatchNorm):
    """`torch.nn.BatchNorm1d`, hand-written."""

    layer, dimensions = batchnorm.BatchNorm, 2


class BatchNorm2d(_BatchNorm):
    """`torch.nn.BatchNorm2d`, hand-written."""

    layer, dimensions = batchnorm.SpatialBatchNorm, 4


class BatchNorm1dAlt(_BatchNorm):
    """`torch.nn.BatchNorm1d`, hand-written, with the simplified backward."""

    layer, dimensions = batchnorm.BatchNormAlt, 2


class BatchNorm2dAlt(_BatchNorm):
    """`torch.nn.BatchNorm2d`, hand-written, with the simplified backward."""

    layer, dimensions = batchnorm.SpatialBatchNormAlt, 4


_SHARED = {"Linear": Linear, "ReLU": ReLU, "Dropout": Dropout, "Conv2d": Conv2d, "MaxPool2d": MaxPool2d}
MANUAL_LAYERS = SimpleNamespace(**_SHARED, BatchNorm1d=BatchNorm1d, BatchNorm2d=BatchNorm2d)
MANUAL_ALT_LAYERS = SimpleNamespace(**_SHARED, BatchNorm1d=BatchNorm1dAlt, BatchNorm2d=BatchNorm2dAlt)
