"""The type of the `layers` argument of models."""

from collections.abc import Callable
from typing import Protocol

from torch import nn

LayerType = Callable[..., nn.Module]


class LayerNamespace(Protocol):
    """Layers to build a model from: `torch.nn`, or one of the namespaces of `cvlab.layers` with the same names."""

    @property
    def BatchNorm2d(self) -> LayerType: ...  # noqa: D102, N802

    @property
    def Conv2d(self) -> LayerType: ...  # noqa: D102, N802

    @property
    def Dropout(self) -> LayerType: ...  # noqa: D102, N802

    @property
    def Linear(self) -> LayerType: ...  # noqa: D102, N802

    @property
    def MaxPool2d(self) -> LayerType: ...  # noqa: D102, N802

    @property
    def ReLU(self) -> LayerType: ...  # noqa: D102, N802
