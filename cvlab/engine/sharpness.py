"""Sharpness-aware minimization: take the gradient where, near the weights, the loss of the batch is largest.

References:
    Foret et al., 2021, "Sharpness-aware minimization for efficiently improving generalization", algorithm 1.

Differences from the paper:
    Several processes move their weights along the gradient of the whole batch, as one process does, not each along that
    of its share. The statistics of BatchNorm are those of the weights themselves.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

TINY = 1e-12  # smallest norm of a gradient that is divided by


@contextlib.contextmanager
def perturbed(model: nn.Module, parameters: Sequence[nn.Parameter], radius: float) -> Iterator[None]:
    """Move parameters along their gradients, together by `radius` in the L2 norm; at the end, move them back.

    Parameters and buffers are restored to the last bit, the new gradients stay. Gradients that are not finite, as
    float16 has some, move nothing.

    Args:
        model: The model, whose buffers are restored too.
        parameters: Parameters to move, with gradients; those without one stay.
        radius: Rho in the paper.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
    tensors: list[torch.Tensor] = [*(parameter.detach() for parameter in moved), *model.buffers()]
    before = [tensor.clone() for tensor in tensors]
    scale = radius / nn.utils.get_total_norm(gradients).clamp(min=TINY)
    offsets = torch._foreach_mul(gradients, scale)
    with torch.no_grad():
        for parameter, offset in zip(moved, offsets, strict=True):
            parameter.add_(offset.nan_to_num_(0.0, posinf=0.0, neginf=0.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
