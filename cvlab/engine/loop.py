"""The training loop: forward, losses, finite check, backward, step. It knows no YAML, no files and no command line.

    for losses in fit(state, loss_fn, get_batch, lr_factor=lambda step: 1.0, ctx=select_device()):
        ...  # the caller logs, evaluates, saves and stops when it wants to

Batches and learning rates are pure functions of the step, so a run that resumes from `TrainState.state_dict()` ends
bit-for-bit identical to one that was never stopped.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cvlab import _compat
from cvlab.distributed import collectives, ddp
from cvlab.distributed.step_flags import StepFlags
from cvlab.engine.device import ComputeContext, get_rng_state, set_rng_state
from cvlab.errors import CheckpointError, DivergedError

Batch = TypeVar("Batch")
Losses = dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], Losses]


class TrainState:
    """What changes during training: weights, optimizer, moving average of the weights, number of steps done.

    Args:
        model: The model to train.
        optimizer: Its optimizer; the learning rates it has now are those that `fit` scales.
        ema_decay: Decay of the exponential moving average of the weights; None for no average.

    Attributes:
        uses_ema: Whether the average is evaluated, saved as the result and exported, if there is one.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema_decay: float | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ema_decay = ema_decay
        self.ema_model = copy.deepcopy(model).requires_grad_(False) if ema_decay is not None else None
        self.uses_ema = True
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.step = 0
        self.any_rank_flags = StepFlags()  # of the last step

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate: the moving average of the weights if there is one and it is used, else the model."""
        return self.model if self.ema_model is None or not self.uses_ema else self.ema_model

    def update_ema(self) -> None:
        """Move the average towards the weights and, since they belong to them, towards BatchNorm's statistics.

        The decay rises from 2 / 11 at the first step, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`:
        with a constant decay the random initial weights dominate the average for some 1 / (1 - decay) steps.
        """
        if self.ema_model is None or self.ema_decay is None:
            return
        weight = 1 - min(self.ema_decay, (2 + self.step) / (11 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema_model.parameters()), list(self.model.parameters()), weight=weight)
            for ema_buffer, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
                if buffer.is_floating_point():
                    ema_buffer.lerp_(buffer, weight)
                else:
                    ema_buffer.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state with that of the random generators; the tensors are the live ones, not copies."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema_model": None if self.ema_model is None else self.ema_model.state_dict(),
            "uses_ema": self.uses_ema,
            "rng": get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: A part of the state is missing.
        """
        missing = [key for key in ("step", "model", "optimizer", "ema_model", "uses_ema", "rng") if key not in state]
        if missing or (state["ema_model"] is None) != (self.ema_model is None):
            raise CheckpointError(f"the checkpoint lacks {', '.join(missing) or 'the moving average of the weights'}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(state["ema_model"])
        self.uses_ema = state["uses_ema"]
        self.step = state["step"]
        set_rng_state(state["rng"])


def fit(
    state: TrainState,
    loss_fn: LossFn[Batch],
    get_batch: Callable[[int], Batch],
    *,
    lr_factor: Callable[[int], float],
    ctx: ComputeContext,
    clip_norm: float | None = None,
    local_flags: Callable[[], StepFlags] = StepFlags,
) -> Iterator[Losses]:
    """Train from `state.step` on, one step for each item that the caller takes, without end.

    Args:
        state: Model, optimizer and step; changed in place.
        loss_fn: Called as `loss_fn(model, batch)`; returns scalars by name, of which `loss` is minimized.
        get_batch: Returns the batch of a step; of a distributed run, this rank's shard of it.
        lr_factor: Returns what the learning rate of every parameter group is multiplied by at a step.
        ctx: Device and precision.
        clip_norm: Largest L2 norm of the gradient; None for no limit.
        local_flags: Returns what this rank requests; `state.any_rank_flags` is what all ranks together requested.

    Yields:
        The losses of the step, detached, after the update.

    Raises:
        DivergedError: The loss is not finite; the weights are those before the update.
    """
    model, optimizer = state.model, state.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    train_step = ddp.make_step(model, loss_fn, ctx.device, local_flags)
    while True:
        model.train()
        factor = lr_factor(state.step)
        for group, base_lr in zip(optimizer.param_groups, state.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        batch = get_batch(state.step)
        with ctx.autocast():
            losses = train_step.losses(batch)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        state.any_rank_flags, is_finite = train_step.reduce(losses)
        if not is_finite:
            raise _diverged_error(losses, state)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        _compat.optimizer_step(optimizer)
        state.update_ema()
        state.step += 1
        yield {name: value.detach() for name, value in losses.items()}


def _diverged_error(losses: Losses, state: TrainState) -> DivergedError:
    """Return the error about a loss that is not finite, with its step, learning rate and parts."""
    parts = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
    lr = state.optimizer.param_groups[0]["lr"]
    return DivergedError(
        f"the loss is not finite at step {state.step} (batch {state.step}, lr {lr:g}): {parts}",
        "lower optimizer.lr; the last checkpoint is valid",
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    measure: Callable[[nn.Module, Batch], dict[str, Tensor]],
    ctx: ComputeContext,
) -> dict[str, float]:
    """Return the means over a data set of what `measure` sums up over a batch; ranks are added.

    Args:
        model: Evaluated in eval mode; its mode is restored.
        batches: This rank's batches.
        measure: Called as `measure(model, batch)`; returns sums by name and, as `count`, the number of items.
        ctx: Device and precision.
    """
    was_training = model.training
    model.eval()
    totals: dict[str, Tensor] = {}
    for batch in batches:
        with ctx.autocast():
            sums = measure(model, batch)
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value
    model.train(was_training)
    totals = collectives.all_reduce_sums(totals)
    count = totals.pop("count").item()
    return {name: value.item() / count for name, value in totals.items()}
