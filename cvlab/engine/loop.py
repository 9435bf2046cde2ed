"""Fit, evaluate, optimise pixels: forward, losses, finite check, backward, step. No YAML, no paths, no Typer.

    for losses in fit(training, loss_fn, batch_at, lr_factor=lambda step: 1.0, where=compute()):
        ...  # the caller logs, evaluates, saves and stops when it wants to

A batch is a pure function of the step, a learning rate too, so that a run which continues from `Training.state()`
ends with the same bits as one that was never stopped.
"""

import contextlib
import copy
import ctypes
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cvlab.distributed import process_group
from cvlab.errors import CheckpointError, DeviceError, DivergedError

Batch = TypeVar("Batch")
Losses = dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], Losses]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Compute:
    """Where and how to compute: a device, a precision, a number of CPU threads."""

    device: torch.device
    precision: str  # float32 | bfloat16 (autocast, weights stay float32) | float64
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and weights: float64 if asked for, else float32."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a forward pass runs."""
        if self.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def told(self) -> dict[str, Any]:
        """Return device, precision and threads as plans and records say them."""
        return {"device": str(self.device), "precision": self.precision, "threads": self.threads}

    def circumstances(self) -> dict[str, Any]:
        """Return what must be equal for a result to be equal bit for bit."""
        return self.told() | {"torch": str(torch.__version__)}

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compute(device: str = "auto", precision: str = "auto", threads: int | None = None) -> Compute:
    """Choose device, precision and threads; DeviceError where what was asked for is not there."""
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    hint = "use --device cpu, or --device auto to take what is there"
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device in ("auto", "cuda") and process_group.world().size > 1:
            chosen = torch.device("cuda", process_group.world().local_rank)
        if (chosen.index or 0) >= count:
            raise DeviceError(f"device {device} is not there: {count} CUDA devices", hint)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps is not there", hint)
    if precision == "auto":
        precision = "bfloat16" if fast_bfloat16(chosen) else "float32"
    return Compute(chosen, precision, torch.get_num_threads())


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step.

    By default it gives each back to the kernel and has every page of the next one zeroed again: a quarter of the time
    of a small convolutional net on two cores. Elsewhere than on glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; without it bfloat16 is many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - user models may draw from the global generator
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the states of all global generators, as tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the global generators back to a state of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])


class Training:
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
            "rng": rng_state(),
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
    training: Training,
    loss_fn: LossFn[Batch],
    batch_at: Callable[[int], Batch],
    *,
    lr_factor: Callable[[int], float],
    where: Compute,
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
    together = process_group.together(model, loss_fn, where.device, len(wishes()))
    while True:
        model.train()
        factor = lr_factor(training.step)
        for group, base_lr in zip(optimizer.param_groups, training.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        batch = batch_at(training.step)
        with where.autocast():
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


def _diverged(losses: Losses, training: Training) -> DivergedError:
    """Word that the loss is not finite, naming step, learning rate and part."""
    parts = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
    lr = training.optimizer.param_groups[0]["lr"]
    return DivergedError(
        f"the loss is not finite at step {training.step} (batch {training.step}, lr {lr:g}): {parts}",
        "lower optimizer.lr; the last checkpoint is whole",
    )


class Pixels:
    """What changes while pictures are optimised: the tensors they are made from, an update's memory, steps done.

    `tensors` are pixels, or what pictures are decoded from; their sizes may differ.
    """

    def __init__(self, tensors: list[Tensor], memory: dict[str, list[Tensor]] | None = None, step: int = 0) -> None:
        self.tensors = tensors
        self.memory = memory if memory is not None else {}
        self.step = step

    def keep(self, wanted: list[int]) -> "Pixels":
        """Return the same with some of the tensors only, by position."""
        memory = {name: [values[k] for k in wanted] for name, values in self.memory.items()}
        return Pixels([self.tensors[k] for k in wanted], memory, self.step)


Update = Callable[[Pixels, list[Tensor]], None]


def optimise_pixels(pixels: Pixels, objective: Callable[[Pixels], Losses], update: Update) -> Iterator[Losses]:
    """Optimise pictures by the gradient of a loss; yields the losses of every step, detached, after its update.

    `objective(pixels)` gives `loss`, the sum over all pictures, and whatever else the caller wants to see of the
    pictures as they were; `update(pixels, gradients)` changes `pixels.tensors` in place, downhill. It takes a step when
    the caller asks for one, and knows no end. Raises DivergedError before the update if the loss is not finite.
    """
    while True:
        for tensor in pixels.tensors:
            tensor.requires_grad_(True)
        losses = objective(pixels)
        if not math.isfinite(losses["loss"].item()):
            raise DivergedError(f"the loss of the pictures is not finite at step {pixels.step}", "lower lr")
        gradients = list(torch.autograd.grad(losses["loss"], pixels.tensors))
        with torch.no_grad():
            for tensor in pixels.tensors:
                tensor.requires_grad_(False)
            update(pixels, gradients)
        pixels.step += 1
        yield {name: value.detach() for name, value in losses.items()}


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], measure: Callable[[nn.Module, Batch], dict[str, Tensor]], where: Compute
) -> dict[str, float]:
    """Return the means of what `measure(model, batch)` sums up; it gives sums and, as `count`, of how many.

    The sums of several processes are added.
    """
    was_training = model.training
    model.eval()
    totals: dict[str, Tensor] = {}
    for batch in batches:
        with where.autocast():
            sums = measure(model, batch)
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value
    model.train(was_training)
    totals = process_group.total(totals)
    count = totals.pop("count").item()
    return {name: value.item() / count for name, value in totals.items()}
