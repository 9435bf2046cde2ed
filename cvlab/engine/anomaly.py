"""Find the layer that produced the first value that is not finite, in the forward or in the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from cvlab.distributed import collectives


class AnomalyRecorder:
    """Record by forward hooks which layers of a model return values that are not finite.

    Nothing is read from the device before `source` or `gradient_source` is called.

    Args:
        model: The model, in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._records: list[tuple[nn.Module, Tensor, Tensor]] = []  # in the order of the ends of their forward passes
        for module in self._names:
            module.register_forward_hook(self._record)

    def start_step(self) -> None:
        """Forget the records of the step before."""
        self._records = []

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.is_inference_mode_enabled():  # of an evaluation
            self._records.append((module, _has_non_finite(inputs), _has_non_finite(output)))

    def source(self) -> str:
        """Return where the first value that is not finite came from in a forward pass on any rank."""
        return self._first_of_ranks(self._local_source())

    def _local_source(self) -> str:
        for module, is_bad_input, is_bad_output in self._records:
            if is_bad_input:
                return f"the input of {self._about(module)}"
            if is_bad_output:
                bad = [name for name, value in module.named_parameters() if not value.isfinite().all()]
                return self._about(module) + (f", whose {bad[0]} is not finite" if bad else "")
        return ""

    def gradient_source(self) -> str:
        """Return which layer has the first gradient that is not finite, in the order of the backward pass."""
        for module, *_ in reversed(self._records):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    return f"the gradient of {name} of {self._about(module)}"
        return ""

    def _about(self, module: nn.Module) -> str:
        name = self._names[module]
        kind = type(module).__name__
        return f"layer {name} ({kind})" if name else f"the model ({kind})"

    def _first_of_ranks(self, source: str) -> str:
        sources = [text for text in collectives.all_gather_object(source) if text]
        return sources[0] if sources else "the loss function: all layers are finite"


def _has_non_finite(values: Any) -> Tensor:
    """Return whether any tensor in nested containers has a value that is not finite, a bool scalar."""
    tensors = [x for x in _pytree.tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors:
        return torch.tensor(False)
    return torch.stack([~x.detach().isfinite().all() for x in tensors]).any()
