"""Fit, evaluate, optimise pixels: forward, losses, finite check, backward, step. No YAML, no paths, no Typer.

    for losses in fit(training, loss_fn, batch_at, lr_factor=lambda step: 1.0, where=compute()):
        ...  # the caller logs, evaluates, saves and stops when it wants to

A batch is a pure function of the step, a learning rate too, so that a run which continues from `Training.state()`
ends with the same bits as one that was never stopped.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cvlab.distributed import collectives, ddp
from cvlab.engine.device import ComputeContext, get_rng_state, set_rng_state
from cvlab.errors import CheckpointError, DivergedError

Batch = TypeVar("Batch")
Losses = dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], Losses]


class TrainState:
    """What changes during training: weights, optimizer, average of the weights, number of steps done."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema_decay: float | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ema_decay = ema_decay
        self.average = copy.deepcopy(model).requires_grad_(False) if ema_decay is not None else None
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.step = 0
        self.agreed: list[bool] = []  # what any process has wished for in the last step

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the average of the weights if there is one."""
        return self.model if self.average is None else self.average

    def update_average(self) -> None:
        """Move the average towards the weights; buffers (BatchNorm's statistics) are taken over."""
        if self.average is None or self.ema_decay is None:
            return
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), weight=1 - self.ema_decay
            )
            for mine, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)

    def state(self) -> dict[str, Any]:
        """Return all of it, with the generators; the tensors are the live ones, not copies."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "rng": get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state of `state()`; CheckpointError if a piece is missing."""
        missing = [key for key in ("step", "model", "optimizer", "average", "rng") if key not in state]
        if missing or (state["average"] is None) != (self.average is None):
            raise CheckpointError(f"the checkpoint lacks {', '.join(missing) or 'the average of the weights'}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step = state["step"]
        set_rng_state(state["rng"])


def fit(
    training: TrainState,
    loss_fn: LossFn[Batch],
    batch_at: Callable[[int], Batch],
    *,
    lr_factor: Callable[[int], float],
    ctx: ComputeContext,
    clip_norm: float | None = None,
    wishes: Callable[[], Sequence[bool]] = tuple,
) -> Iterator[Losses]:
    """Train from `training.step` on; yields the losses of every step, detached, after its update.

    It takes a step when the caller asks for one, and knows no end. `lr_factor(step)` scales each group's learning rate.
    `wishes()` says what this process wishes for; after the step `training.agreed` says which any process has had.
    Raises DivergedError before the update if the loss is not finite.
    """
    model, optimizer = training.model, training.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    together = ddp.make_step(model, loss_fn, ctx.device, len(wishes()))
    while True:
        model.train()
        factor = lr_factor(training.step)
        for group, base_lr in zip(optimizer.param_groups, training.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        batch = batch_at(training.step)
        with ctx.autocast():
            losses = together.losses(batch, wishes())
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        training.agreed, is_finite = together.agreed(losses)
        if not is_finite:
            raise _diverged(losses, training)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        training.update_average()
        training.step += 1
        yield {name: value.detach() for name, value in losses.items()}


def _diverged(losses: Losses, training: TrainState) -> DivergedError:
    """Word that the loss is not finite, naming step, learning rate and part."""
    parts = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
    lr = training.optimizer.param_groups[0]["lr"]
    return DivergedError(
        f"the loss is not finite at step {training.step} (batch {training.step}, lr {lr:g}): {parts}",
        "lower optimizer.lr; the last checkpoint is whole",
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    measure: Callable[[nn.Module, Batch], dict[str, Tensor]],
    ctx: ComputeContext,
) -> dict[str, float]:
    """Return the means of what `measure(model, batch)` sums up; it gives sums and, as `count`, of how many.

    The sums of several processes are added.
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
