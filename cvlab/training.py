"""One training in a run directory: start or resume, fit, log, evaluate, save, stop.

Every experiment that trains hands over a `Job`: its model, its loss, its batches and its evaluation. What a resume
needs is in the checkpoint: `Training.state()` and what is gathered here (see `Session.state`).
"""

import copy
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cvlab import __version__, checkpoint, engine, lookup, optim
from cvlab.console import Progress
from cvlab.engine import Losses, Training
from cvlab.errors import CheckpointError, ConfigError, DivergedError
from cvlab.jobs import Job, TrainConfig
from cvlab.rundir import RunDir
from cvlab.schema import Duration
from cvlab.signals import StopRequest

SAVE_SHARE = 50  # a save may cost 1/50 of the time between two saves
CALIBRATION_SHARE = 0.03  # of a budget in seconds, spent on measuring the time of a step ...
CALIBRATION_SECONDS = 5.0  # ... but no longer than this
FORMAT = 1
METRICS = ("train_loss", "best_step", "steps", "epochs", "parameters", "train_seconds", "images_per_second")


def lacking(own: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """Return the keys that a state lacks, dotted, down to the second level where its keys are always the same."""
    missing = [key for key in own if key not in state]
    for key in {"rng", "gathered", "circumstances"}.difference(missing):
        missing += [f"{key}.{part}" for part in own[key] if part not in state[key]]
    return missing


@dataclass
class Gathered:
    """What a run knows besides its weights; part of every checkpoint."""

    total_steps: int
    train_seconds: float = 0.0
    loss_sums: dict[str, torch.Tensor] = field(default_factory=dict)
    loss_steps: int = 0
    best_value: float | None = None
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def train(settings: TrainConfig, job: Job, out: RunDir) -> tuple[nn.Module, dict[str, float]]:
    """Train to the end, from the newest checkpoint of `out` if there is one; return the model and the metrics."""
    with StopRequest() as stop:
        session = Session(settings, job, out)
        session.begin(stop)
        session.run(stop)
    model = session.training.evaluated
    out.facts["weights_sha256"] = checkpoint.weights_digest(model.state_dict())
    return model, session.final_metrics()


class Session:
    """A training on its way."""

    def __init__(self, settings: TrainConfig, job: Job, out: RunDir) -> None:
        self.settings, self.job, self.out = settings, job, out
        self.config_sha256 = settings.digest()
        arguments = settings.optimizer.arguments()
        optimizer = optim.build_optimizer(settings.optimizer.name, job.model, arguments)
        self.training = Training(job.model, optimizer, settings.ema)
        self.gathered = Gathered(0)
        self.save_cost = 0.0
        self.saved_at = time.monotonic()
        self.saved_step = -1

    def begin(self, stop: StopRequest) -> None:
        """Take over the newest checkpoint, or write the one before the first step."""
        if any(self.out.checkpoints.glob("*.pt")) or self.out.sync_metrics():
            path, state = checkpoint.newest(self.out.checkpoints, self.out.log)
            self._restore(state, str(path))
            self.out.log(f"resumed {path.name}: {self.training.step} of {self.gathered.total_steps} steps are done")
        else:
            self.gathered.total_steps = self._plan_steps(stop)
            self.save()
        period = max(self.settings.save_seconds, SAVE_SHARE * self.save_cost)
        self.out.log(f"{self.gathered.total_steps} steps; kill -9 loses at most {period:.0f} s of work")

    def _plan_steps(self, stop: StopRequest) -> int:
        duration = self.settings.duration
        if duration.steps is not None:
            return duration.steps
        if duration.epochs is not None:
            return duration.epochs * self.job.steps_per_epoch
        assert duration.seconds is not None
        steps = self._steps_within(duration.seconds, stop)
        self.settings = self.settings.model_copy(update={"duration": Duration(steps=steps)})
        self.config_sha256 = self.settings.digest()
        self.out.write_text("config.yaml", self.settings.to_yaml())  # so that `cvlab run` on it repeats this run
        return steps

    def _steps_within(self, seconds: float, stop: StopRequest) -> int:
        """Measure the time of a step on a copy of the state, put the state back, and say how many steps fit."""
        before = copy.deepcopy(self.training.state())
        times: list[float] = []
        began = last = time.perf_counter()
        for _ in self._fit(total_steps=1_000_000):
            self.job.where.synchronize()
            now = time.perf_counter()
            times.append(now - last)
            last = now
            if stop.received is not None:
                raise stop.error(0, self.out.path.name)
            if now - began > min(CALIBRATION_SHARE * seconds, CALIBRATION_SECONDS) and len(times) > 3:
                break
        self.training.load(before)
        typical = sorted(times[2:])[len(times[2:]) // 2]
        steps = int(seconds / typical)
        if steps < 1:
            raise ConfigError(
                f"duration.seconds: {seconds:g} s are too short for one step, which takes {typical:.2g} s"
            )
        self.out.log(
            f"{seconds:g} s of training (evaluation and loading not counted): a step takes {1000 * typical:.1f} ms, "
            f"so {steps} steps; repeat it with duration.steps={steps}"
        )
        return steps

    def _restore(self, state: dict[str, Any], path: str) -> None:
        missing = lacking(self.state(), state)
        if missing:
            raise CheckpointError(f"{path}: lacks {', '.join(missing)}", "it was not written by this version of cvlab")
        if state["config_sha256"] != self.config_sha256:
            raise CheckpointError(f"{path}: config.yaml was changed since", "start the changed one with `cvlab run`")
        checkpoint.match_model(self.training.model, state["model"], path)
        for key, now in self._circumstances().items():
            if state["circumstances"].get(key) != now:
                was = state["circumstances"].get(key)
                self.out.log(f"warning: {key} was {was}, is {now}: the result is not bitwise that of an unbroken run")
        self.training.load(state)
        self.gathered = Gathered(**state["gathered"])
        sums = self.gathered.loss_sums.items()
        self.gathered.loss_sums = {name: value.to(self.job.where.device) for name, value in sums}
        self.out.truncate_metrics(state["metrics_bytes"])
        self.saved_step = self.training.step
        own = checkpoint.path_of(self.out.checkpoints, self.saved_step)
        if self.gathered.best_step == self.saved_step and own.is_file():
            checkpoint.link_best(own)  # a kill may have come between the checkpoint and its link

    def _circumstances(self) -> dict[str, Any]:
        """Return what must be equal for a resume to be equal bit for bit."""
        where = self.job.where
        return {
            "device": str(where.device),
            "precision": where.precision,
            "threads": where.threads,
            "torch": str(torch.__version__),
            "cvlab": __version__,
        }

    def _fit(self, total_steps: int) -> Any:
        schedule = lookup.find("schedule", self.settings.schedule.name, optim.SCHEDULES.names)
        arguments = self.settings.schedule.arguments()

        def lr_factor(progress: float) -> float:
            return optim.warmed_up(schedule(progress, **arguments), progress, self.settings.warmup)

        return engine.fit(
            self.training,
            self.job.loss_fn,
            self.job.batch_at,
            total_steps=total_steps,
            lr_factor=lr_factor,
            where=self.job.where,
            clip_norm=self.settings.clip_norm,
        )

    def run(self, stop: StopRequest) -> None:
        """Do the steps that are left. StoppedError, after a checkpoint, if a signal asked to stop."""
        total = self.gathered.total_steps
        with Progress(self.settings.name, total, self.training.step) as progress:
            self._stop_if_asked(stop)
            began = time.perf_counter()
            for losses in self._fit(total):
                self._gather(losses)
                step = self.training.step
                if self._is_due(step):
                    self.job.where.synchronize()
                    self.gathered.train_seconds += time.perf_counter() - began
                    self._pause(step)
                    began = time.perf_counter()
                if progress.due():
                    progress.update(step, self._progress_text(losses, time.perf_counter() - began))
                if stop.received is not None:
                    self.gathered.train_seconds += time.perf_counter() - began
                    self._stop_if_asked(stop)

    def _gather(self, losses: Losses) -> None:
        sums = self.gathered.loss_sums  # on the device: reading a number would make it wait
        for name, value in losses.items():
            sums[name] = sums[name] + value if name in sums else value
        self.gathered.loss_steps += 1

    def _is_due(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or self._evaluation_due(step) or self._save_due()

    def _evaluation_due(self, step: int) -> bool:
        return step % (self.job.steps_per_epoch * self.settings.eval_every) == 0 or step == self.gathered.total_steps

    def _save_due(self) -> bool:
        since = time.monotonic() - self.saved_at
        return since >= max(self.settings.save_seconds, SAVE_SHARE * self.save_cost)

    def _pause(self, step: int) -> None:
        """Between two steps: log, evaluate, save, whichever is due. The clock of the training stands still."""
        if step % self.settings.log_every == 0 or step == self.gathered.total_steps:
            self._log_losses(step)
        is_best = self._evaluation_due(step) and self._evaluate(step)
        if is_best or self._save_due() or step == self.gathered.total_steps:
            self.save(is_best)

    def _log_losses(self, step: int) -> None:
        count = self.gathered.loss_steps
        sums = self.gathered.loss_sums
        means = {"train_loss" if name == "loss" else name: value.item() / count for name, value in sums.items()}
        self.gathered.loss_sums, self.gathered.loss_steps = {}, 0
        self.gathered.metrics["train_loss"] = means["train_loss"]
        lr = self.training.optimizer.param_groups[0]["lr"]
        self._append(step, {"lr": lr, **means})

    def _evaluate(self, step: int) -> bool:
        """Evaluate and log; return whether these weights are the best so far."""
        found = self.job.evaluate(self.training.evaluated)
        self._append(step, found)
        wrong = [name for name, value in found.items() if not math.isfinite(value)]
        if wrong:
            raise DivergedError(f"{wrong[0]} is not finite at step {step}", "lower optimizer.lr")
        self.gathered.metrics |= found
        value = found[self.job.monitor]
        if self.gathered.best_value is not None and value <= self.gathered.best_value:
            return False
        self.gathered.best_value, self.gathered.best_step = value, step
        return True

    def _append(self, step: int, values: dict[str, float]) -> None:
        seconds = round(self.gathered.train_seconds, 4)
        self.out.append({"step": step, "epoch": step / self.job.steps_per_epoch, "seconds": seconds, **values})

    def _progress_text(self, losses: Losses, since: float) -> str:
        seconds = self.gathered.train_seconds + since
        rate = self.training.step * self.job.items_per_step / max(seconds, 1e-9)
        parts = [f"{name} {value.item():.3f}" for name, value in losses.items()]
        monitor = self.gathered.metrics.get(self.job.monitor)
        parts += [f"{self.job.monitor} {monitor:.3f}"] if monitor is not None else []
        return "  ".join([*parts, f"{rate:,.0f} images/s"])

    def _stop_if_asked(self, stop: StopRequest) -> None:
        if stop.received is not None:
            if self.saved_step != self.training.step:
                self.save()
            raise stop.error(self.training.step, self.out.path.name)

    def state(self) -> dict[str, Any]:
        """Return everything a resume needs."""
        return self.training.state() | {
            "format": FORMAT,
            "gathered": vars(self.gathered).copy(),
            "metrics_bytes": self.out.sync_metrics(),
            "config_sha256": self.config_sha256,
            "circumstances": self._circumstances(),
        }

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint of this step."""
        began = time.monotonic()
        checkpoint.save(self.out.checkpoints, self.training.step, self.state(), is_best)
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - began
        self.saved_step = self.training.step
        self.out.set_status("running", step=self.training.step, total_steps=self.gathered.total_steps)

    def final_metrics(self) -> dict[str, float]:
        """Return the metrics of the last evaluation and what they cost."""
        gathered = self.gathered
        items = self.training.step * self.job.items_per_step
        parameters = sum(parameter.numel() for parameter in self.job.model.parameters())
        assert gathered.best_value is not None, "the last step is always evaluated"
        return gathered.metrics | {
            f"best_{self.job.monitor}": gathered.best_value,
            "best_step": gathered.best_step,
            "steps": self.training.step,
            "epochs": self.training.step / self.job.steps_per_epoch,
            "parameters": parameters,
            "train_seconds": gathered.train_seconds,
            "images_per_second": items / max(gathered.train_seconds, 1e-9),
        }
