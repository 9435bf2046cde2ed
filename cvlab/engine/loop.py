"""The training loop: forward, losses, finite check, backward, step. It knows no YAML, no files and no command line.

    for losses in fit(state, loss_fn, get_batch, lr_factor=lambda step: 1.0, ctx=select_device()):
        ...  # the caller logs, evaluates, saves and stops when it wants to

Batches and learning rates are pure functions of the step, so a run that resumes from `TrainState.state_dict()` ends
bit-for-bit identical to one that was never stopped.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cvlab import _compat
from cvlab.distributed import collectives, ddp
from cvlab.distributed.step_flags import StepFlags
from cvlab.engine import optimizers, sharpness
from cvlab.engine.anomaly import AnomalyRecorder
from cvlab.engine.device import ComputeContext, get_rng_state, set_rng_state
from cvlab.engine.gradient_log import GradientLog
from cvlab.engine.parameters import set_train_mode
from cvlab.errors import CheckpointError, DivergedError

Batch = TypeVar("Batch")
Losses = dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], Losses]
STATE_KEYS = ("step", "model", "optimizer", "ema_model", "uses_ema", "scaler", "rng")


class UnreadLosses:
    """The losses of the last steps, on the device, until they are read together: each read waits for the device."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, float, Losses, Tensor]] = []

    def add(self, step: int, lr: float, losses: Losses, diverged: Tensor) -> None:
        """Add the losses of a step; `diverged` is a bool tensor, whether the loss is not finite on any rank."""
        self._steps.append((step, lr, {name: value.detach() for name, value in losses.items()}, diverged))

    def require_finite(self) -> None:
        """Read the losses that were added since the last call. Raises DivergedError about the first bad step."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        diverged = torch.stack([flag for *_, flag in steps]).tolist()
        for (step, lr, losses, _), is_bad in zip(steps, diverged, strict=True):
            if is_bad:
                raise _diverged_error(losses, step, lr)


class TrainState:
    """What changes during training: weights, optimizer, moving average of the weights, number of steps done.

    Args:
        model: The model to train.
        optimizer: Its optimizer; the learning rates it has now are those that `fit` scales.
        ema_decay: Decay of the exponential moving average of the weights; None for no average.
        scaler: Scales the loss of float16; None for other precisions.

    Attributes:
        ema_model: A copy of the model with averaged weights: their moving average, or the average of a schedule-free
            optimizer, which `refresh_average` copies; None if there is neither.
        uses_ema: Whether the average is evaluated, saved as the result and exported, if there is one.
        unread: The losses that were not read yet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema_decay: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.unread = UnreadLosses()
        self.ema_decay = ema_decay
        if scaler is not None:
            optimizers.prepare_for_skipped_steps(optimizer)
        self.is_schedule_free = optimizers.averages_weights(optimizer)
        has_average = ema_decay is not None or self.is_schedule_free
        self.ema_model = copy.deepcopy(model).requires_grad_(False) if has_average else None
        self.uses_ema = True
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.step = 0
        self.any_rank_flags = StepFlags()  # of the last step

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate: the average of the weights if there is one and it is used, else the model."""
        self.refresh_average()
        return self.model if self.ema_model is None or not self.uses_ema else self.ema_model

    def refresh_average(self) -> None:
        """Copy the average of a schedule-free optimizer, which it computes in place of the weights; these are restored.

        BatchNorm's statistics are those of the weights that are trained.
        """
        if not self.is_schedule_free or self.ema_model is None:
            return
        optimizer: Any = self.optimizer
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        weights = [parameter.detach().clone() for parameter in trained]
        optimizer.eval()
        self.ema_model.load_state_dict(self.model.state_dict())
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_(trained, weights)

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
        """Return the state with that of the random generators; the tensors are the live ones, not copies.

        Raises:
            DivergedError: The loss of a step since the last read is not finite.
        """
        self.unread.require_finite()
        self.refresh_average()
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema_model": None if self.ema_model is None else self.ema_model.state_dict(),
            "uses_ema": self.uses_ema,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "rng": get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: A part of the state is missing.
        """
        missing = [key for key in STATE_KEYS if key not in state]
        if missing or (state["ema_model"] is None) != (self.ema_model is None):
            raise CheckpointError(f"the checkpoint lacks {', '.join(missing) or 'the moving average of the weights'}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(state["ema_model"])
        self.uses_ema = state["uses_ema"]
        if self.scaler is not None and state["scaler"] is not None:  # None: it ran on a device with bfloat16
            self.scaler.load_state_dict(state["scaler"])
        self.unread = UnreadLosses()
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
    forward_model: nn.Module | None = None,
    split_batch: Callable[[Batch], Sequence[Batch]] | None = None,
    attack: Callable[[nn.Module, Batch, int], Batch] | None = None,
    anomaly: AnomalyRecorder | None = None,
    gradient_log: GradientLog | None = None,
    sam: float | None = None,
) -> Iterator[Losses]:
    """Train from `state.step` on, one step for each item that the caller takes, without end.

    With `ctx.read_every` above 1, the losses and the requests of other ranks are read once in that number of steps, and
    by `state.state_dict()`, so that no checkpoint is written after a loss that is not finite.

    Args:
        state: Model, optimizer and step; changed in place.
        loss_fn: Called as `loss_fn(model, batch)`; returns scalars by name, of which `loss` is minimized.
        get_batch: Returns the batch of a step; of a distributed run, this rank's shard of it.
        lr_factor: Returns what the learning rate of every parameter group is multiplied by at a step.
        ctx: Device, precision, and how often the losses are read.
        clip_norm: Largest L2 norm of the gradient; None for no limit.
        local_flags: Returns what this rank requests; `state.any_rank_flags` is what all ranks together requested.
        forward_model: Passed to `loss_fn` instead of the model whose weights it shares, for example a compiled one.
        split_batch: Returns the equal parts of a batch, whose gradients are averaged; None: the batch is one.
        attack: Returns the examples to train on instead of a batch, see `TrainTask`; None: the batch.
        anomaly: Names the layer in the error about a loss that is not finite; requires `ctx.read_every` 1.
        gradient_log: Its metrics are among the losses; None for none.
        sam: Radius of sharpness-aware minimization: the gradient of a second backward pass is used; None for none.

    Yields:
        The losses of the step, detached, after the update.

    Raises:
        DivergedError: The loss is not finite; the weights are those before the update if every loss is read.
    """
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    train_step = ddp.make_step(forward_model or state.model, loss_fn, ctx.device, local_flags)
    while True:
        _set_learning_rates(state, lr_factor(state.step))
        if anomaly is not None:
            anomaly.start_step()
        parts = (split_batch or _whole)(_examples(state, get_batch, attack, ctx))
        losses = _compute_gradients(state, train_step, parts, ctx, anomaly)
        if sam is not None:
            with sharpness.perturbed(state.model, parameters, sam):
                _compute_gradients(state, train_step, parts, ctx, anomaly)
        if anomaly is not None and state.scaler is None:  # float16 skips steps whose gradients overflow
            _require_finite_gradients(state, anomaly)
        _update_weights(state, parameters, clip_norm, gradient_log)
        losses |= gradient_log.metrics() if gradient_log is not None else {}
        state.update_ema()
        state.step += 1
        yield losses


def _examples(
    state: TrainState,
    get_batch: Callable[[int], Batch],
    attack: Callable[[nn.Module, Batch, int], Batch] | None,
    ctx: ComputeContext,
) -> Batch:
    """Return the batch of the step, attacked once if it is to be; the model is in training mode afterwards.

    All ranks attack with the statistics of rank 0, which are the ones that are saved.
    """
    set_train_mode(state.model)
    batch = get_batch(state.step)
    if attack is None:
        return batch
    collectives.broadcast_buffers(state.model)
    state.model.eval()
    with ctx.autocast():
        batch = attack(state.model, batch, state.step)
    set_train_mode(state.model)
    return batch


def _whole(batch: Batch) -> Sequence[Batch]:
    return [batch]


def _set_learning_rates(state: TrainState, factor: float) -> None:
    for group, base_lr in zip(state.optimizer.param_groups, state.base_lrs, strict=True):
        group["lr"] = base_lr * factor


def _compute_gradients(
    state: TrainState,
    train_step: ddp.SingleProcessStep,
    parts: Sequence[Batch],
    ctx: ComputeContext,
    anomaly: AnomalyRecorder | None,
) -> Losses:
    """Replace the gradients by those of all parts on all ranks; return this rank's losses, detached."""
    losses = _backward(state, train_step, parts, ctx)
    _reduce(state, train_step, losses, ctx.read_every, anomaly)
    return losses


def _backward(
    state: TrainState, train_step: ddp.SingleProcessStep, parts: Sequence[Batch], ctx: ComputeContext
) -> Losses:
    """Replace the gradients by the mean of those of the parts of a batch; return the mean losses, detached.

    The activations of one part at a time are in memory.
    """
    totals: Losses = {}
    for index, part in enumerate(parts):
        with train_step.part(is_last=index == len(parts) - 1):
            with ctx.autocast():
                losses = train_step.losses(part)
            if index == 0:
                state.optimizer.zero_grad(set_to_none=True)
            loss = losses["loss"] if len(parts) == 1 else losses["loss"] / len(parts)
            if state.scaler is not None:
                loss = state.scaler.scale(loss)
            loss.backward()
        for name, value in losses.items():
            totals[name] = totals[name] + value.detach() if name in totals else value.detach()
    return totals if len(parts) == 1 else {name: total / len(parts) for name, total in totals.items()}


def _reduce(
    state: TrainState,
    train_step: ddp.SingleProcessStep,
    losses: Losses,
    read_every: int,
    anomaly: AnomalyRecorder | None,
) -> None:
    """Exchange flags with the other ranks after a backward pass, and check that the loss is finite on all of them.

    With `read_every` above 1 the losses are stored, and read if the step ends a group of that many.
    """
    if read_every == 1:
        state.any_rank_flags, is_finite = train_step.reduce(losses)
        if not is_finite:
            raise _diverged_error(losses, state.step, state.optimizer.param_groups[0]["lr"], anomaly)
        return
    is_read = (state.step + 1) % read_every == 0
    state.any_rank_flags, diverged = train_step.reduce_later(losses, is_read)
    state.unread.add(state.step, state.optimizer.param_groups[0]["lr"], losses, diverged)
    if is_read:
        state.unread.require_finite()


def _require_finite_gradients(state: TrainState, anomaly: AnomalyRecorder) -> None:
    """Raise DivergedError about a gradient that is not finite, the same on all ranks."""
    source = anomaly.gradient_source()
    if source:
        raise DivergedError(f"{source} is not finite at step {state.step}, the loss is", "lower optimizer.lr")


def _update_weights(
    state: TrainState, parameters: list[nn.Parameter], clip_norm: float | None, gradient_log: GradientLog | None
) -> None:
    """Clip the gradients and take the optimizer's step; in float16 it is skipped if a gradient is not finite."""
    scaler = state.scaler
    if scaler is not None and (clip_norm is not None or gradient_log is not None):
        scaler.unscale_(state.optimizer)
    if gradient_log is not None:
        gradient_log.before_update()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    if scaler is None:
        _compat.optimizer_step(state.optimizer)
    else:
        scaler.step(state.optimizer)
        scaler.update()


def _diverged_error(losses: Losses, step: int, lr: float, anomaly: AnomalyRecorder | None = None) -> DivergedError:
    """Return the error about a loss that is not finite, with its step, learning rate and parts."""
    parts = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
    origin = f"; the first value that is not finite came from {anomaly.source()}" if anomaly else ""
    return DivergedError(
        f"the loss is not finite at step {step} (batch {step}, lr {lr:g}): {parts}{origin}",
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
