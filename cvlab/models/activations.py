"""What the layers of a network compute: statistics over many images, and the feature maps of single ones."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cvlab import registry
from cvlab.errors import ConfigError
from cvlab.ops.saliency import FeatureLayer, map_axes

RELU_FUNCTIONS = (F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
SKIPPED = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)  # they compute nothing in evaluation mode
SKIPPED_NAMES = ("DropPath",)  # as the classes in SKIPPED, of other packages
CHANNEL_AXES = {"NCHW": 1, "NHWC": 3, "tokens": 2}


@dataclass
class LayerActivations:
    """The outputs of a layer over some images.

    Attributes:
        name: The name of its module; further calls in one forward pass are numbered, as are functions within a module.
        layer: The name of its class.
        shape: The shape of its output for one image.
        is_relu: Whether it is a ReLU or ReLU6, whose channels may be dead.
        count: Number of values.
        sums: Sum of the values and of their squares, float64 (2,).
        is_active: Which of its channels were ever positive, bool (C,).
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    is_relu: bool
    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    is_active: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return float(self.sums[0] / self.count)

    @property
    def std(self) -> float:
        """The standard deviation of all values."""
        return float((self.sums[1] / self.count - (self.sums[0] / self.count) ** 2).clamp(min=0).sqrt())

    @property
    def num_dead(self) -> int:
        """The number of channels that were never positive."""
        return int((~self.is_active).sum())

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return len(self.is_active)

    @property
    def dead_fraction(self) -> float | None:
        """The fraction of the channels of a ReLU that were never positive; None for other layers."""
        return self.num_dead / self.num_channels if self.is_relu else None

    def add(self, output: Tensor) -> None:
        """Add the output of a batch, (N, ...)."""
        values = output.detach().float()
        self.count += values.numel()
        self.sums += torch.stack([values.sum(dtype=torch.float64), values.square().sum(dtype=torch.float64)]).cpu()
        axis = channel_axis(values)
        axes = [other for other in range(values.ndim) if other != axis]
        is_active = (values.amax(axes) > 0).cpu() if axes else (values > 0).cpu()
        self.is_active = self.is_active | is_active if len(self.is_active) else is_active


def channel_axis(output: Tensor) -> int:
    """Return the axis of the channels of an output (N, ...): the first, or the last of tokens and of (N, H, W, C)."""
    return CHANNEL_AXES.get(map_axes(output[:1]) or "", 2 if output.ndim == 3 else 1)


def to_maps(output: Tensor) -> Tensor | None:
    """Return an output (N, ...) as feature maps (N, C, h, w); None if its axes are no channels and positions."""
    axes = map_axes(output[:1])
    if axes is None and output.ndim == 4:
        axes = "NCHW"  # as many channels as rows and columns: the common order
    return None if axes is None else FeatureLayer(nn.Identity(), axes).to_maps(output)


class _Functions(TorchFunctionMode):
    """Calls `on_relu` with the result of each ReLU function of torch."""

    def __init__(self, on_relu: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.on_relu = on_relu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        result = func(*args, **(kwargs or {}))
        if func in RELU_FUNCTIONS:
            self.on_relu(result)
        return result


class ActivationRecorder:
    """Records the outputs of all layers of a network in the order of their calls; use it with `recording`.

    A layer is a module without parts. ReLUs that are functions of torch are recorded too, behind the name of the module
    that calls them.

    Attributes:
        layers: What the layers compute, by name.
        map_layers: The last module of each height of its feature maps, among those of the two outer levels.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.layers: dict[str, LayerActivations] = {}
        self.map_layers: dict[int, str] = {}
        self._num_images = 0  # of the batch
        self._stack: list[tuple[str, nn.Module]] = []  # modules that are being called
        self._calls: Counter[str] = Counter()  # of this forward pass

    @contextlib.contextmanager
    def recording(self, num_images: int) -> Iterator[None]:
        """A context in which the forward pass of a batch is recorded; may be entered once for each batch."""
        handles = []
        self._num_images = num_images
        self._calls.clear()
        for name, module in self.network.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with _Functions(self._add_function):
                yield
        finally:
            self._stack.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, _args: object) -> None:
            self._stack.append((name, module))

        return hook

    def _leave(self, module: nn.Module, _args: object, output: object) -> None:
        name, _ = self._stack.pop()
        layer = type(module).__name__
        if not any(module.children()) and not isinstance(module, SKIPPED) and layer not in SKIPPED_NAMES:
            self._add(name or layer, layer, output, _is_relu(module))
        if name and name.count(".") < 2 and isinstance(output, Tensor) and len(output) == self._num_images:
            maps = to_maps(output)
            if maps is not None and maps.shape[2] > 1:
                self.map_layers.pop(maps.shape[2], None)
                self.map_layers[maps.shape[2]] = name

    def _add_function(self, output: Tensor) -> None:
        name, module = self._stack[-1] if self._stack else ("", self.network)
        if not _is_relu(module):  # which is recorded itself
            self._add(f"{name}.relu" if name else "relu", "relu", output, True)

    def _add(self, name: str, layer: str, output: object, is_relu: bool) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
            return
        self._calls[name] += 1
        if self._calls[name] > 1:
            name = f"{name}#{self._calls[name]}"
        if name not in self.layers:
            self.layers[name] = LayerActivations(name, layer, tuple(output.shape[1:]), is_relu)
        self.layers[name].add(output)


def _is_relu(module: nn.Module) -> bool:
    return isinstance(module, (nn.ReLU, nn.ReLU6))


def check_layers(network: nn.Module, names: Sequence[str]) -> None:
    """Raise ConfigError unless a network has modules of these names."""
    modules = dict(network.named_modules())
    for name in names:
        if not name or name not in modules:
            raise registry.unknown_name_error("layer", name, [key for key in modules if key and key.count(".") < 2])


@contextlib.contextmanager
def recorded_outputs(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A context in which the (last) outputs of some layers are written into a dictionary.

    Raises:
        ConfigError: The network has no such layer.
    """
    check_layers(network, names)
    modules, outputs = dict(network.named_modules()), dict[str, Tensor]()

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.detach().clone()  # what follows may work in place

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def require_outputs(outputs: dict[str, Tensor], names: Sequence[str]) -> None:
    """Raise ConfigError unless all layers were computed and have a tensor as output."""
    for name in names:
        if name not in outputs or outputs[name].ndim < 2:
            raise ConfigError(f"layer {name!r} gives no activations of an image", "name another one")
