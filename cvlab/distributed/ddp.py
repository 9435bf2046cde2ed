"""One training step in a single process, or averaged over ranks by DistributedDataParallel."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvlab.distributed.process_group import world
from cvlab.distributed.step_flags import StepFlags

LossFn = Callable[[nn.Module, Any], dict[str, Tensor]]
LocalFlags = Callable[[], StepFlags]

BUCKET_MB = 100  # of gradients that are reduced together; on a CPU the exchange takes the core from the backward pass


class SingleProcessStep:
    """Compute the losses of a step in one process."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, local_flags: LocalFlags) -> None:
        self.model, self.loss_fn, self.local_flags = model, loss_fn, local_flags

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch, or of this rank's shard of it."""
        return self.loss_fn(self.model, batch)

    def part(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:  # noqa: ARG002 - for several ranks
        """Return the context of the forward and the backward pass of a part of a batch; ranks meet in the last one."""
        return contextlib.nullcontext()

    def reduce(self, losses: Mapping[str, Tensor]) -> tuple[StepFlags, bool]:
        """Return, after the backward pass, the flags of all ranks and whether the loss is finite on all of them."""
        return self.local_flags(), math.isfinite(losses["loss"].item())

    def reduce_later(self, losses: Mapping[str, Tensor], is_read: bool) -> tuple[StepFlags, Tensor]:  # noqa: ARG002
        """Return the same without waiting for the device: whether the loss is not finite stays a bool tensor there.

        With several ranks, the flags are read if `is_read`, else there are none: a rank requests until it is heard.
        """
        return self.local_flags(), ~torch.isfinite(losses["loss"].detach())


class _LossModule(nn.Module):
    """The loss as a module that owns the model, for DDP, and a parameter whose gradient carries the flags.

    `flags` is always 0, so it does not change the loss; its gradient is what is passed in, averaged by DDP.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, device: torch.device) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn
        count = len(StepFlags().encode()) + 1  # the last one: whether the loss is not finite
        self.flags = nn.Parameter(torch.zeros(count, dtype=next(model.parameters()).dtype, device=device))

    def forward(self, batch: Any, local_flags: Tensor) -> dict[str, Tensor]:
        losses = self.loss_fn(self.model, batch)
        diverged = ~torch.isfinite(losses["loss"].detach()).view(1)
        gradient = torch.cat([local_flags, diverged.to(local_flags)])
        return losses | {"loss": losses["loss"] + (self.flags * gradient).sum().to(losses["loss"])}


class DDPStep(SingleProcessStep):
    """Compute the losses of a step on one of several ranks; DDP averages their gradients.

    The flags, and whether the loss is finite, travel as the gradient of a parameter that is always 0, in the same
    reduction as the other gradients: a reduction of their own costs a small model a tenth of its step. The buckets stay
    as they are created (a consequence of `find_unused_parameters`), so that a resumed run adds in the same order as an
    uninterrupted one. BatchNorm statistics are not synchronized: those of rank 0 are saved.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, local_flags: LocalFlags, device: torch.device) -> None:
        super().__init__(model, loss_fn, local_flags)
        self.module = _LossModule(model, loss_fn, device)
        self.no_flags = torch.zeros_like(self.module.flags.detach()[:-1])
        self.ddp = DistributedDataParallel(
            self.module,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=True,
            broadcast_buffers=False,
            bucket_cap_mb=BUCKET_MB,
        )

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of this rank's shard of a batch."""
        flags = self.local_flags().encode()
        requested = self.module.flags.new_tensor(flags) if any(flags) else self.no_flags  # a copy waits for a GPU
        losses: dict[str, Tensor] = self.ddp(batch, requested)
        return losses

    def part(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the forward and the backward pass of a part of a batch; ranks meet in the last one."""
        return contextlib.nullcontext() if is_last else self.ddp.no_sync()

    def reduce(self, losses: Mapping[str, Tensor]) -> tuple[StepFlags, bool]:  # noqa: ARG002 - as in the base class
        """Return, after the backward pass, the flags of all ranks and whether the loss is finite on all of them."""
        assert self.module.flags.grad is not None
        *requested, diverged = (self.module.flags.grad > 0).tolist()
        self.module.flags.grad = None
        return StepFlags.decode(requested), not diverged

    def reduce_later(self, losses: Mapping[str, Tensor], is_read: bool) -> tuple[StepFlags, Tensor]:  # noqa: ARG002
        """Return the flags of all ranks if `is_read`, and whether the loss is not finite on any, a bool tensor."""
        assert self.module.flags.grad is not None
        any_rank = self.module.flags.grad > 0
        self.module.flags.grad = None
        flags = StepFlags.decode(any_rank[:-1].tolist()) if is_read else StepFlags()
        return flags, any_rank[-1]


def make_step(
    model: nn.Module, loss_fn: LossFn, device: torch.device, local_flags: LocalFlags = StepFlags
) -> SingleProcessStep:
    """Return what computes the losses of a step: alone, or with the other ranks of the process group.

    Args:
        model: The model to train.
        loss_fn: Called as `loss_fn(model, batch)`; returns scalars by name, of which `loss` is minimized.
        device: The device of the model.
        local_flags: Returns what this rank requests at the moment.
    """
    if world().size == 1:
        return SingleProcessStep(model, loss_fn, local_flags)
    return DDPStep(model, loss_fn, local_flags, device)
