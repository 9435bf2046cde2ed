"""Optimize images in a run directory: start or resume, step, log, save frames and checkpoints, stop.

A resume needs the tensors that are optimized, the state of the optimizer and the step; randomness is a function of the
seed and the step.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvlab.console import Progress
from cvlab.engine import update_rules
from cvlab.engine.checkpointer import Checkpointer
from cvlab.engine.device import ComputeContext
from cvlab.engine.loop import Losses
from cvlab.errors import DivergedError
from cvlab.runs.checkpoint import State
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir


class ImageState:
    """What changes while images are optimized.

    Attributes:
        tensors: Pixels, or what images are decoded from, for example Fourier coefficients; sizes may differ.
        optimizer_state: For each name, one tensor for each of `tensors`; empty before the first step.
        step: Number of steps done.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.optimizer_state: dict[str, list[Tensor]] = {}
        self.step = 0


Update = Callable[[ImageState, list[Tensor]], None]


@dataclass(frozen=True)
class ImageOptimization:
    """Images to optimize, and how; see `optimization_steps`.

    Attributes:
        state: The images at the start; changed in place.
        objective: Returns the losses of the images; the sum `loss` is minimized.
        update: Called as `update(state, gradients)`; changes `state.tensors` and `state.optimizer_state`.
        steps: Number of steps.
        ctx: Device and precision.
        config_digest: Digest of the configuration.
        frame_steps: Steps after which `save_frame` is called, 0 for the start.
        save_frame: Called as `save_frame(step, state)`.
        log_every: Steps between two rows of metrics.jsonl.
        save_seconds: Minimum seconds between two checkpoints.
    """

    state: ImageState
    objective: Callable[[ImageState], Losses]
    update: Update
    steps: int
    ctx: ComputeContext
    config_digest: str
    frame_steps: frozenset[int]
    save_frame: Callable[[int, ImageState], None]
    log_every: int = 10
    save_seconds: float = 60.0


def optimize_image(task: ImageOptimization, run_dir: RunDir, label: str) -> dict[str, float]:
    """Optimize to the end, from the latest checkpoint of the run directory if it has one.

    Args:
        task: The images and their objective; `task.state` holds the result.
        run_dir: Where metrics, log and checkpoints go; its lock is held.
        label: Name on the progress bar.

    Returns:
        The last losses, the number of steps and their seconds, by name.

    Raises:
        StoppedError: A signal was received; a checkpoint has been written.
        DivergedError: The loss is not finite.
    """
    optimizer = _ImageOptimizer(task, run_dir)
    with StopRequest() as stop:
        optimizer.begin()
        optimizer.run(stop, label)
    return optimizer.metrics | {"steps": task.state.step, "seconds_of_steps": optimizer.seconds}


def format_losses(losses: Losses) -> str:
    """Return the losses for the progress bar: the parts if there are several, else the whole."""
    parts = {name: value for name, value in losses.items() if value.ndim == 0 and name.endswith("_loss")}
    return ", ".join(f"{name.replace('_', ' ')} {value.item():.4g}" for name, value in (parts or losses).items())


class _ImageOptimizer:
    """An optimization in progress."""

    best_step = None

    def __init__(self, task: ImageOptimization, run_dir: RunDir) -> None:
        self.task, self.run_dir = task, run_dir
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self.checkpointer = Checkpointer(self, run_dir, task.ctx, task.save_seconds)

    @property
    def step(self) -> int:
        return self.task.state.step

    @property
    def total_steps(self) -> int:
        return self.task.steps

    def begin(self) -> None:
        """Restore the latest checkpoint, or save the images as they are."""
        self.checkpointer.begin(self._save_frame)

    def state_dict(self) -> State:
        """Return everything that the remaining steps depend on; the images are saved as a model's weights are."""
        state = self.task.state
        return {
            "step": state.step,
            "model": {f"images.{k}": tensor.detach() for k, tensor in enumerate(state.tensors)},
            "optimizer_state": state.optimizer_state,
            "metrics": self.metrics,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: State, path: Path) -> None:  # noqa: ARG002 - as Resumable has it
        """Restore what `state_dict` returned."""
        images, device = self.task.state, self.task.ctx.device
        images.tensors = [tensor.to(device) for tensor in state["model"].values()]
        images.optimizer_state = {
            name: [tensor.to(device) for tensor in tensors] for name, tensors in state["optimizer_state"].items()
        }
        images.step = state["step"]
        self.metrics, self.seconds = state["metrics"], state["seconds"]

    def config_digest(self, state: State) -> str:  # noqa: ARG002 - as Resumable has it
        return self.task.config_digest

    def run(self, stop: StopRequest, label: str) -> None:
        """Take the remaining steps; log, save frames and checkpoints between them."""
        task, state = self.task, self.task.state
        with Progress(label, task.steps, state.step) as bar:
            self._stop_if_set(stop)
            steps = optimization_steps(state, task.objective, task.update)
            while state.step < task.steps:
                start = time.perf_counter()
                losses = next(steps)
                task.ctx.synchronize()
                self.seconds += time.perf_counter() - start
                self._between_steps(losses)
                if bar.due():
                    bar.update(state.step, format_losses(losses))
                self._stop_if_set(stop)
        self.checkpointer.save()

    def _between_steps(self, losses: Losses) -> None:
        step = self.step
        if step % self.task.log_every == 0 or step == self.task.steps:
            self.metrics = {name: value.item() for name, value in losses.items() if value.ndim == 0}
            self.run_dir.append({"step": step, "seconds": round(self.seconds, 4), **self.metrics})
        self._save_frame()
        if self.checkpointer.schedule.is_due():
            self.checkpointer.save()

    def _save_frame(self) -> None:
        if self.step in self.task.frame_steps:
            self.task.save_frame(self.step, self.task.state)

    def _stop_if_set(self, stop: StopRequest) -> None:
        """Save and raise StoppedError if a signal was received."""
        if stop.received is not None:
            self.checkpointer.save_and_stop(stop)


def adam(get_lr: Callable[[int], float], last_reset: Callable[[int], int] = lambda _: 0) -> Update:
    """Return Adam's update of images; its moments are in the optimizer state.

    Args:
        get_lr: Returns the learning rate of a step.
        last_reset: Returns the step at which the optimizer state was emptied last, as seen from a step.
    """

    def update(images: ImageState, gradients: list[Tensor]) -> None:
        moments = images.optimizer_state or {
            name: [torch.zeros_like(tensor) for tensor in images.tensors] for name in ("mean", "square")
        }
        images.optimizer_state = moments
        num_updates = images.step - last_reset(images.step)
        for k, gradient in enumerate(gradients):
            state: dict[str, Any] = {name: tensors[k] for name, tensors in moments.items()} | {"step": num_updates}
            images.tensors[k], state = update_rules.adam(images.tensors[k], gradient, state, get_lr(images.step))
            for name, tensors in moments.items():
                tensors[k] = state[name]

    return update


def optimization_steps(
    state: ImageState, objective: Callable[[ImageState], Losses], update: Update
) -> Iterator[Losses]:
    """Optimize images by the gradient of a loss, one step for each item that the caller takes, without end.

    Args:
        state: The images; changed in place.
        objective: Returns `loss`, the sum over all images, and further values to report about the images before the
            update.
        update: Called as `update(state, gradients)`; changes `state.tensors` to lower the loss.

    Yields:
        The losses of the step, detached, after the update.

    Raises:
        DivergedError: The loss is not finite; the images are those before the update.
    """
    while True:
        for tensor in state.tensors:
            tensor.requires_grad_(True)
        losses = objective(state)
        if not math.isfinite(losses["loss"].item()):
            raise DivergedError(f"the loss of the images is not finite at step {state.step}", "lower lr")
        gradients = list(torch.autograd.grad(losses["loss"], state.tensors))
        with torch.no_grad():
            for tensor in state.tensors:
                tensor.requires_grad_(False)
            update(state, gradients)
        state.step += 1
        yield {name: value.detach() for name, value in losses.items()}
