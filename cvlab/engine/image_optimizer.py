"""One optimisation of pictures in a run directory: start or resume, step, log, keep frames, save, stop.

What a resume needs is in the checkpoint: the tensors that the pictures are made from, the update's memory, the step.
Randomness is a function of seed and step, so nothing of it needs saving.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvlab import __version__
from cvlab.console import Progress
from cvlab.engine import update_rules
from cvlab.engine.device import ComputeContext
from cvlab.engine.loop import Losses
from cvlab.engine.task import SAVE_SHARE
from cvlab.errors import DivergedError
from cvlab.runs import checkpoint
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir


class ImageState:
    """What changes while pictures are optimised: the tensors they are made from, an update's memory, steps done.

    `tensors` are pixels, or what pictures are decoded from; their sizes may differ.
    """

    def __init__(self, tensors: list[Tensor], memory: dict[str, list[Tensor]] | None = None, step: int = 0) -> None:
        self.tensors = tensors
        self.memory = memory if memory is not None else {}
        self.step = step

    def keep(self, wanted: list[int]) -> "ImageState":
        """Return the same with some of the tensors only, by position."""
        memory = {name: [values[k] for k in wanted] for name, values in self.memory.items()}
        return ImageState([self.tensors[k] for k in wanted], memory, self.step)


Update = Callable[[ImageState, list[Tensor]], None]

FORMAT = 1


@dataclass(frozen=True)
class ImageOptimization:
    """What an experiment wants optimised: see `engine.optimise_pixels`.

    `keep_frame(step, pixels)` is called after the steps in `frames`; `digest` is that of the configuration.
    """

    pixels: ImageState
    objective: Callable[[ImageState], Losses]
    update: Update
    steps: int
    ctx: ComputeContext
    digest: str
    frames: frozenset[int]
    keep_frame: Callable[[int, ImageState], None]
    log_every: int = 10
    save_seconds: float = 60.0


def optimize_image(painting: ImageOptimization, out: RunDir, name: str) -> dict[str, float]:
    """Optimise to the end, from the newest checkpoint of `out` if there is one; return the last losses and the time.

    StoppedError, after a checkpoint, if a signal asked to stop.
    """
    session = _Session(painting, out)
    session.begin()
    with StopRequest() as stop, Progress(name, painting.steps, painting.pixels.step) as progress:
        session.stop_if_asked(stop)
        for losses in session.steps():
            if progress.due():
                progress.update(painting.pixels.step, format_losses(losses))
            session.stop_if_asked(stop)
    session.save()
    return session.metrics | {"steps": painting.pixels.step, "seconds_of_steps": session.seconds}


def format_losses(losses: Losses) -> str:
    """Return the losses as the bar shows them: the parts where there are several, else the whole."""
    parts = {name: value for name, value in losses.items() if value.ndim == 0 and name.endswith("_loss")}
    return ", ".join(f"{name.replace('_', ' ')} {value.item():.4g}" for name, value in (parts or losses).items())


class _Session:
    """An optimisation on its way."""

    def __init__(self, painting: ImageOptimization, out: RunDir) -> None:
        self.painting, self.out = painting, out
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self.saved_at, self.save_cost, self.saved_step = time.monotonic(), 0.0, -1

    def begin(self) -> None:
        """Take over the newest checkpoint, or start."""
        pixels = self.painting.pixels
        if any(self.out.checkpoints.glob("*.pt")):
            path, state = checkpoint.load_latest(self.out.checkpoints, self.out.log)
            self._restore(state, str(path))
            self.out.log(f"resumed {path.name}: {pixels.step} of {self.painting.steps} steps are done")
        else:
            self.out.truncate_metrics(0)
            self._keep_frame()
            self.save()
        period = max(self.painting.save_seconds, SAVE_SHARE * self.save_cost)
        self.out.log(f"{self.painting.steps} steps; kill -9 loses at most {period:.0f} s of work")

    def _restore(self, state: dict[str, Any], path: str) -> None:
        checkpoint.check_complete(sorted(self.state().keys() - state.keys()), path)
        checkpoint.check_same_config(state, self.painting.digest, self._circumstances(), path, self.out.log)
        pixels, device = self.painting.pixels, self.painting.ctx.device
        pixels.tensors = [tensor.to(device) for tensor in state["model"].values()]
        pixels.memory = {key: [tensor.to(device) for tensor in kept] for key, kept in state["memory"].items()}
        pixels.step = self.saved_step = state["step"]
        self.metrics, self.seconds = state["metrics"], state["seconds"]
        self.out.truncate_metrics(state["metrics_bytes"])

    def _circumstances(self) -> dict[str, Any]:
        return self.painting.ctx.circumstances() | {"cvlab": __version__}

    def steps(self) -> Iterator[Losses]:
        """Do the steps that are left: log, keep frames and save between them, whichever is due."""
        painting, pixels = self.painting, self.painting.pixels
        going = optimization_steps(pixels, painting.objective, painting.update)
        while pixels.step < painting.steps:
            began = time.perf_counter()
            losses = next(going)
            painting.ctx.synchronize()
            self.seconds += time.perf_counter() - began
            if pixels.step % painting.log_every == 0 or pixels.step == painting.steps:
                self.metrics = {name: value.item() for name, value in losses.items() if value.ndim == 0}
                self.out.append({"step": pixels.step, "seconds": round(self.seconds, 4), **self.metrics})
            self._keep_frame()
            if time.monotonic() - self.saved_at >= max(painting.save_seconds, SAVE_SHARE * self.save_cost):
                self.save()
            yield losses

    def _keep_frame(self) -> None:
        if self.painting.pixels.step in self.painting.frames:
            self.painting.keep_frame(self.painting.pixels.step, self.painting.pixels)

    def stop_if_asked(self, stop: StopRequest) -> None:
        """Save and raise StoppedError where a signal has come."""
        if stop.received is not None:
            self.save()
            raise stop.error(self.painting.pixels.step, self.out.path.name)

    def state(self) -> dict[str, Any]:
        """Return everything a resume needs; the pictures take the model's place."""
        pixels = self.painting.pixels
        return {
            "format": FORMAT,
            "step": pixels.step,
            "model": {f"pixels.{k}": tensor.detach() for k, tensor in enumerate(pixels.tensors)},
            "memory": pixels.memory,
            "metrics": self.metrics,
            "seconds": self.seconds,
            "metrics_bytes": self.out.sync_metrics(),
            "config_sha256": self.painting.digest,
            "circumstances": self._circumstances(),
        }

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        step = self.painting.pixels.step
        if self.saved_step == step:
            return
        began = time.monotonic()
        checkpoint.save(self.out.checkpoints, step, self.state())
        self.saved_at = time.monotonic()
        self.save_cost, self.saved_step = self.saved_at - began, step
        self.out.set_status("running", step=step, total_steps=self.painting.steps)


def adam(lr_at: Callable[[int], float], since: Callable[[int], int] = lambda _: 0) -> Update:
    """Return Adam's update of pixels, its learning rate a function of the step, its moments in the pixels' memory.

    `since(step)` is the step at which the memory was empty last.
    """

    def update(pixels: ImageState, gradients: list[torch.Tensor]) -> None:
        if not pixels.memory:
            pixels.memory = {key: [torch.zeros_like(t) for t in pixels.tensors] for key in ("mean", "square")}
        done = pixels.step - since(pixels.step)
        for k, gradient in enumerate(gradients):
            state: dict[str, Any] = {key: kept[k] for key, kept in pixels.memory.items()}
            moved, state = update_rules.adam(pixels.tensors[k], gradient, state | {"step": done}, lr_at(pixels.step))
            pixels.tensors[k] = moved
            for key, kept in pixels.memory.items():
                kept[k] = state[key]

    return update


def lbfgs(lr: float) -> Update:
    """Return L-BFGS's update of a single picture, its history in the pixels' memory."""

    def update(pixels: ImageState, gradients: list[torch.Tensor]) -> None:
        state: dict[str, Any] = dict(pixels.memory)
        if state:
            state |= {key: state[key][0] for key in ("gradient", "move")}
        pixels.tensors[0], state = update_rules.lbfgs(pixels.tensors[0], gradients[0], state, lr)
        pixels.memory = {key: kept if isinstance(kept, list) else [kept] for key, kept in state.items()}

    return update


def optimization_steps(
    pixels: ImageState, objective: Callable[[ImageState], Losses], update: Update
) -> Iterator[Losses]:
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
