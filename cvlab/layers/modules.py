"""The hand-written layers as modules: torch.nn's constructors and state_dict names, our forward and backward.

One `autograd.Function` carries them all. A model built from `MANUAL` or `MANUAL_ALT` (the other derivation of
BatchNorm's backward) reads and writes the same checkpoints as one built from torch.nn.
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
    """Calls a layer's own forward and backward, and nothing of autograd in between."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, options: tuple[Any, ...], see: CacheCallback | None, *tensors: Tensor | None
    ) -> Tensor:
        out, cache = layer.forward(*tensors, *options)
        if see is not None:
            see(cache)
        ctx.layer, ctx.cache, ctx.num_tensors = layer, cache, len(tensors)
        result: Tensor = out
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.layer.backward(dout, ctx.cache)
        return (None, None, None, *grads, *([None] * (ctx.num_tensors - len(grads))))


def apply_layer(
    layer: Any, *tensors: Tensor | None, options: tuple[Any, ...] = (), see: CacheCallback | None = None
) -> Tensor:
    """Run a layer on tensors so that autograd calls its own backward.

    `options` follow the tensors in the layer's `forward`; `see` is shown the cache, for what a module wants to know.
    There is no autocast inside: a layer computes in the dtype of its weights.
    """
    with torch.autocast(tensors[0].device.type, enabled=False):  # type: ignore[union-attr]
        if len(tensors) > 1:  # weights are float32 or float64; a layer below may have given bfloat16
            weight = tensors[1]
            assert tensors[0] is not None
            assert weight is not None
            if weight.is_floating_point():
                tensors = (tensors[0].to(weight.dtype), *tensors[1:])
        found: Tensor = _ManualFunction.apply(layer, options, see, *tensors)  # type: ignore[no-untyped-call]
    return found


def _single_value(layer: nn.Module, name: str) -> int:
    """Return the one number that an option of a layer is in both directions; ConfigError where it is not one."""
    value: Any = getattr(layer, name)
    first, second = value if isinstance(value, tuple) else (value, value)
    if first != second or not isinstance(first, int):
        raise ConfigError(f"hand-written {type(layer).__name__}: {name} {value}: only one number for both directions")
    return first


def _require_options(layer: nn.Module, **expected: Any) -> None:
    """Raise ConfigError where a layer has an option that is not written out here."""
    for name, value in expected.items():
        if (found := getattr(layer, name)) != value:
            raise ConfigError(
                f"hand-written {type(layer).__name__}: {name}={found} is not there, only {name}={value}",
                "use layers: torch",
            )


class Linear(nn.Linear):
    """`torch.nn.Linear` by hand."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, D) to (N, M)."""
        return apply_layer(linear.Linear, x, self.weight, self.bias)


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` by hand."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape elementwise."""
        return apply_layer(linear.ReLU, x)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by hand: zeroes in training, does nothing in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape elementwise."""
        return apply_layer(linear.Dropout, x, options=(self.p,)) if self.training else x


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` by hand, with square kernels, one stride and one padding; ConfigError for anything else."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _require_options(self, groups=1, dilation=(1, 1), padding_mode="zeros")
        _single_value(self, "kernel_size")
        self.chosen = (_single_value(self, "stride"), _single_value(self, "padding"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, F, Ho, Wo)."""
        return apply_layer(conv.Conv2d, x, self.weight, self.bias, options=self.chosen)


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` by hand, with square windows; ConfigError for anything else."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _require_options(self, padding=0, dilation=1, ceil_mode=False, return_indices=False)
        self.chosen = (_single_value(self, "kernel_size"), _single_value(self, "stride"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, Ho, Wo)."""
        return apply_layer(conv.MaxPool2d, x, options=self.chosen)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the forms share: batch statistics in training, which also move the running ones as torch.nn does it."""

    layer: Any
    dimensions: int

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _require_options(self, affine=True, track_running_stats=True)
        if self.momentum is None:
            raise ConfigError(f"hand-written {type(self).__name__}: momentum=None is not there", "use layers: torch")

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim == self.dimensions, input.shape

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel of (N, C) or (N, C, H, W)."""
        self._check_input_dim(x)
        if self.training:
            return apply_layer(self.layer, x, self.weight, self.bias, options=(self.eps,), see=self._follow)
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = (1, -1, *([1] * (x.ndim - 2)))
        gamma, beta, mean, var = (t.view(shape) for t in (self.weight, self.bias, self.running_mean, self.running_var))
        return batchnorm.BatchNorm.apply_statistics(x, gamma, beta, mean, var, self.eps)

    def _follow(self, cache: batchnorm.BatchNorm.Cache) -> None:
        """Move the running statistics: running = (1 - momentum) running + momentum batch, the variance unbiased."""
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
    """`torch.nn.BatchNorm1d` by hand."""

    layer, dimensions = batchnorm.BatchNorm, 2


class BatchNorm2d(_BatchNorm):
    """`torch.nn.BatchNorm2d` by hand."""

    layer, dimensions = batchnorm.SpatialBatchNorm, 4


class BatchNorm1dAlt(_BatchNorm):
    """`torch.nn.BatchNorm1d` by hand, with the simplified backward."""

    layer, dimensions = batchnorm.BatchNormAlt, 2


class BatchNorm2dAlt(_BatchNorm):
    """`torch.nn.BatchNorm2d` by hand, with the simplified backward."""

    layer, dimensions = batchnorm.SpatialBatchNormAlt, 4


_SHARED = {"Linear": Linear, "ReLU": ReLU, "Dropout": Dropout, "Conv2d": Conv2d, "MaxPool2d": MaxPool2d}
MANUAL_LAYERS = SimpleNamespace(**_SHARED, BatchNorm1d=BatchNorm1d, BatchNorm2d=BatchNorm2d)
MANUAL_ALT_LAYERS = SimpleNamespace(**_SHARED, BatchNorm1d=BatchNorm1dAlt, BatchNorm2d=BatchNorm2dAlt)
