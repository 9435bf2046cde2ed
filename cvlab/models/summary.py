"""The layers of a model: shapes, parameters, FLOPs, activation memory and receptive fields, from one forward pass.

References:
    Araujo et al., 2019, "Computing receptive fields of convolutional neural networks".
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
REST = "(outside of the layers)"
_CONVOLUTIONS = (aten.convolution, aten._convolution)
_POOLS = (aten.max_pool2d_with_indices, aten.max_pool2d, aten.avg_pool2d)
_SAME_POSITIONS = (  # operators beside the pointwise ones whose result depends on its own position only
    *(aten.clone, aten._to_copy, aten.detach, aten.alias, aten.native_dropout),
    *(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm),
    aten._batch_norm_with_update,
)


@dataclass(frozen=True)
class SummarySpec:
    """A model whose layers are to be summarized.

    Attributes:
        modules: The parts of the model by the prefix of their layers' names; empty for a model in one part.
        forward: Computes the model's result from an input; calls the modules.
        example: An input of one image, (1, C, H, W).
    """

    modules: Mapping[str, nn.Module]
    forward: Callable[[Tensor], object]
    example: Tensor


@dataclass
class LayerSummary:
    """A call of a layer.

    Attributes:
        name: The name of the module in the model.
        layer: The name of its class.
        output_shape: Shape of its (first) output for one image; None before it has returned.
        parameters: Number of its own parameters, counted in the first call.
        flops: Floating-point operations of its convolutions and matrix products, two for a multiply-add.
        activation_bytes: Bytes of the floating-point tensors that it computes.
        receptive_field: Height and width in pixels of the input that an element of the output depends on; None if it is
            not defined by convolution and pooling alone.
    """

    name: str
    layer: str
    output_shape: tuple[int, ...] | None = None
    parameters: int = 0
    flops: int = 0
    activation_bytes: int = 0
    receptive_field: tuple[int, int] | None = None


@dataclass(frozen=True)
class ModelSummary:
    """The layers of a model in the order of their calls, and its number of parameters."""

    layers: list[LayerSummary]
    input_shape: tuple[int, ...]
    parameters: int
    trainable_parameters: int
    parameter_bytes: int

    @property
    def flops(self) -> int:
        """FLOPs of a forward pass of one image."""
        return sum(layer.flops for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all floating-point tensors of a forward pass of one image."""
        return sum(layer.activation_bytes for layer in self.layers)


@dataclass(frozen=True)
class _Window:
    """The input positions, along an axis, of element i of a map: `size` of them from `start + i * jump`."""

    start: int
    size: int
    jump: int

    def slide(self, kernel: int, stride: int, padding: int, dilation: int) -> "_Window":
        """Return the window after a convolution or a pooling."""
        size = self.size + dilation * (kernel - 1) * self.jump
        return _Window(self.start - padding * self.jump, size, self.jump * stride)

    def join(self, other: "_Window") -> "_Window | None":
        """Return the window of a sum of two maps; None if their strides differ."""
        if self.jump != other.jump:
            return None
        start = min(self.start, other.start)
        end = max(self.start + self.size, other.start + other.size)
        return _Window(start, end - start, self.jump)


_Windows = tuple[_Window, _Window]


def _pair(value: Any, default: Any = None) -> tuple[int, int]:
    """Return an argument of an operator as height and width; an empty list stands for the default."""
    values = [value] if isinstance(value, int) else list(value)
    if not values:
        return _pair(default)
    return int(values[0]), int(values[-1])


def _argument(args: tuple[Any, ...], index: int, default: Any) -> Any:
    return args[index] if len(args) > index else default


@dataclass
class _Recorder(TorchDispatchMode):
    """Records every operator of a forward pass under the layer that calls it."""

    rest: LayerSummary
    stack: list[LayerSummary] = field(default_factory=list)
    windows: dict[int, _Windows] = field(default_factory=dict)  # by `id` of a map
    dependent: set[int] = field(default_factory=set)  # `id` of the tensors that are computed from the input
    storages: set[int] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)  # so that no `id` and no storage is used twice

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def add_input(self, image: Tensor) -> None:
        """Begin at an input (1, C, H, W)."""
        self.windows[id(image)] = (_Window(0, 1, 1), _Window(0, 1, 1))
        self.dependent.add(id(image))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record what it computes."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        layer = self.stack[-1] if self.stack else self.rest
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            layer.flops += int(count(*args, **kwargs, out_val=result))
        inputs = [tensor for tensor in _tensors(args) if id(tensor) in self.dependent]
        for tensor in _tensors(result):
            self.alive.append(tensor)
            if inputs:
                self.dependent.add(id(tensor))
            storage = tensor.untyped_storage().data_ptr()
            if tensor.is_floating_point() and storage not in self.storages:
                self.storages.add(storage)
                layer.activation_bytes += tensor.numel() * tensor.element_size()
        output = next(_tensors(result), None)
        if inputs and output is not None:
            windows = self._windows_after(func, args, inputs, output)
            self.windows.pop(id(output), None)
            if windows is not None:
                self.windows[id(output)] = windows
        return result

    def _windows_after(self, func: Any, args: Any, inputs: list[Tensor], output: Tensor) -> _Windows | None:
        """Return the windows of an operator's result; None if they are not defined."""
        known = [self.windows.get(id(tensor)) for tensor in inputs]
        operator = func._overloadpacket
        first = known[0]
        if first is None or output.ndim != 4:
            return None
        if operator in _CONVOLUTIONS:
            if args[6] or len(inputs) > 1:  # transposed, or filters that depend on the input
                return None
            kernel, stride, padding, dilation = tuple(args[1].shape[2:]), args[3], args[4], args[5]
            return _slide(first, kernel, stride, padding, dilation)
        if operator in _POOLS:
            kernel = _pair(args[1])
            dilation = 1 if operator is aten.avg_pool2d else _argument(args, 4, 1)
            return _slide(first, kernel, _pair(_argument(args, 2, ()), kernel), _argument(args, 3, 0), dilation)
        if operator is aten.constant_pad_nd and len(args[1]) <= 4:
            left, top = args[1][0], args[1][2] if len(args[1]) > 2 else 0
            return _slide(first, (1, 1), 1, (top, left), 1)
        is_pointwise = torch.Tag.pointwise in func.tags or operator in _SAME_POSITIONS
        is_joined = operator is aten.cat and _argument(args, 1, 0) in (1, -3)
        same_size = all(tensor.shape[2:] == output.shape[2:] for tensor in inputs)
        return _join(known) if (is_pointwise or is_joined) and same_size else None


def _slide(windows: _Windows, kernel: Any, stride: Any, padding: Any, dilation: Any) -> _Windows:
    arguments = list(zip(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True))
    return windows[0].slide(*arguments[0]), windows[1].slide(*arguments[1])


def _join(known: list[_Windows | None]) -> _Windows | None:
    height, width = known[0] or (None, None)
    for other in known[1:]:
        if other is None or height is None or width is None:
            return None
        height, width = height.join(other[0]), width.join(other[1])
    return None if height is None or width is None else (height, width)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module has a row of its own: it has no parts, or parameters beside those of its parts."""
    return not any(module.children()) or any(True for _ in module.parameters(recurse=False))


@contextlib.contextmanager
def _hooked(spec: SummarySpec, recorder: _Recorder, rows: list[LayerSummary]) -> Iterator[None]:
    """Add a row for each call of a layer, while the recorder is active."""
    counted: set[int] = set()

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, _: Any) -> None:
            parameters = [p for p in module.parameters(recurse=False) if id(p) not in counted]
            counted.update(map(id, parameters))
            row = LayerSummary(name or type(module).__name__, type(module).__name__)
            row.parameters = sum(p.numel() for p in parameters)
            rows.append(row)
            recorder.stack.append(row)

        return hook

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        row = recorder.stack.pop()
        tensor = next(_tensors(output), None)
        if tensor is not None:
            row.output_shape = tuple(tensor.shape)
            windows = recorder.windows.get(id(tensor))
            row.receptive_field = None if windows is None else (windows[0].size, windows[1].size)

    handles = []
    for prefix, root in spec.modules.items():
        for name, module in root.named_modules(prefix=prefix):
            if _is_layer(module):
                handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _without_fused_kernels() -> Iterator[None]:
    """Compute attention and recurrent layers by matrix products, which the table of FLOPs has."""
    fast_attention, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # its `flags` would also set TF32, and warn of it
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        torch.backends.mkldnn.enabled = onednn


def summarize(spec: SummarySpec) -> ModelSummary:
    """Summarize a model by a forward pass of one image in evaluation mode, which changes nothing in it."""
    parameters = {id(p): p for module in spec.modules.values() for p in module.parameters()}
    modes = {module: module.training for root in spec.modules.values() for module in root.modules()}
    rows: list[LayerSummary] = []
    recorder = _Recorder(LayerSummary(REST, ""))
    recorder.add_input(spec.example)
    held = [spec.example, *parameters.values(), *(b for root in spec.modules.values() for b in root.buffers())]
    recorder.storages.update(tensor.untyped_storage().data_ptr() for tensor in held)
    for root in spec.modules.values():
        root.eval()
    try:
        with torch.no_grad(), _without_fused_kernels(), _hooked(spec, recorder, rows), recorder:
            spec.forward(spec.example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    total = sum(p.numel() for p in parameters.values())
    rest = recorder.rest
    rest.parameters = total - sum(row.parameters for row in rows)
    if rest.parameters or rest.flops or rest.activation_bytes:
        rows.append(rest)
    return ModelSummary(
        layers=rows,
        input_shape=tuple(spec.example.shape),
        parameters=total,
        trainable_parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
    )
