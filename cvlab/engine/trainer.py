"""One training in a run directory: start or resume, fit, log, evaluate, save, stop.

Every experiment that trains hands over a `Job`: its model, its loss, its batches and its evaluation. What a resume
needs is in the checkpoint: `Training.state()` and what is gathered here (see `Session.state`).
"""

import copy
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvlab import __version__, registry
from cvlab.config.schema import Duration
from cvlab.console import Progress
from cvlab.distributed import collectives, process_group, sharding
from cvlab.engine import device, loop, optimizers, schedules, time_budget
from cvlab.engine.config import TrainConfig
from cvlab.engine.loop import Losses, TrainState
from cvlab.engine.progress import TrainProgress, missing_keys
from cvlab.engine.task import SAVE_SHARE, TrainTask
from cvlab.engine.time_budget import Plan
from cvlab.errors import DivergedError, StoppedError
from cvlab.runs import checkpoint
from cvlab.runs.interrupt import EXIT_TERMINATED, StopRequest
from cvlab.runs.records import PRUNE, read_prune
from cvlab.runs.run_dir import RunDir

FORMAT = 1
METRICS = ("train_loss", "best_step", "steps", "epochs", "parameters", "train_seconds", "images_per_second")


def train(settings: TrainConfig, job: TrainTask, out: RunDir) -> tuple[nn.Module, dict[str, float]]:
    """Train to the end, from the newest checkpoint of `out` if there is one; return the model and the metrics."""
    with StopRequest() as stop:
        session = Trainer(settings, job, out)
        session.begin(stop)
        session.run(stop)
    session.record_duration()
    model = session.training.evaluated
    out.facts["weights_sha256"] = checkpoint.weights_digest(model.state_dict())
    return model, session.gathered.final_metrics(session.training.step, job)


class Trainer:
    """A training on its way."""

    def __init__(self, settings: TrainConfig, job: TrainTask, out: RunDir) -> None:
        self.settings, self.job, self.out = settings, job, out
        arguments = settings.optimizer.arguments()
        optimizer = optimizers.build_optimizer(settings.optimizer.name, job.model, arguments)
        self.training = TrainState(job.model, optimizer, settings.ema)
        self.gathered = TrainProgress(0)
        self.save_cost = 0.0
        self.saved_at = time.monotonic()
        self.saved_step = -1
        self.reviewed = (0, 0.0)  # step and training time when the plan was last looked at

    def begin(self, stop: StopRequest) -> None:
        """Take over the newest checkpoint, or write the one before the first step."""
        self.settings.require_shares(process_group.world().size)
        sharding.require_divisible(self.job.items_per_step, process_group.world().size)  # less where there is less data
        found = self._newest() if process_group.is_main() else None
        path = collectives.broadcast_from_rank0(lambda: found[0] if found else None)
        if path is not None:
            self._restore(found[1] if found else checkpoint.load(path), str(path))
            self.out.log(f"resumed {path.name}: {self.training.step} of {self.gathered.total_steps} steps are done")
        else:
            if not process_group.is_main():  # what a process draws, as for dropout, is its own
                device.seed_everything(sharding.rank_seed(self.settings.seed))
            self.gathered.follow(self._first_plan(stop))
            self.save()
        period = max(self.settings.save_seconds, SAVE_SHARE * self.save_cost)
        self.out.log(f"{self.gathered.total_steps} steps; kill -9 loses at most {period:.0f} s of work")

    def _newest(self) -> tuple[Path, checkpoint.State] | None:
        """Return the newest checkpoint, if the run had begun."""
        if any(self.out.checkpoints.glob("*.pt")) or self.out.sync_metrics():
            return checkpoint.load_latest(self.out.checkpoints, self.out.log)
        return None

    def _first_plan(self, stop: StopRequest) -> Plan:
        duration = self.settings.duration
        if duration.steps is not None:
            return Plan(duration.steps, duration.corrections)
        if duration.epochs is not None:
            return Plan(duration.epochs * self.job.steps_per_epoch)
        assert duration.seconds is not None
        self.gathered.budget_seconds = duration.seconds
        return self._plan_seconds(duration.seconds, stop)

    def _plan_seconds(self, seconds: float, stop: StopRequest) -> Plan:
        """Measure the time of a step, put the state back, and plan the steps that fit."""
        before, memory = copy.deepcopy((self.training.state(), self.job.memory))
        self.gathered.total_steps = 10**9  # so that the schedule is at its start

        def steps() -> Iterator[Losses]:
            for losses in self._fit(stop):
                stop.raise_if_set(0, self.out.path.name)
                yield losses

        typical = time_budget.seconds_per_step(steps(), seconds, self.job.ctx.synchronize)
        self._take_over(before, memory)
        plan = time_budget.first_plan(seconds, typical)
        self.out.log(
            f"{seconds:g} s of training (loading, evaluation and saving not counted): a step takes "
            f"{1000 * typical:.1f} ms, so about {plan.total} steps; the plan is corrected on the way"
        )
        return plan

    def _restore(self, state: dict[str, Any], path: str) -> None:
        checkpoint.check_complete(missing_keys(self.state(), state), path)
        digest = self._config_digest(state["gathered"]["budget_seconds"])
        checkpoint.check_same_config(state, digest, self._circumstances(), path, self.out.log)
        checkpoint.match_model(self.training.model, state["model"], path)
        self._take_over(state, state["memory"])
        rank = process_group.world().rank
        if rank and rank <= len(state["rng_of_others"]):
            device.set_rng_state(state["rng_of_others"][rank - 1])
        self.gathered = TrainProgress(**state["gathered"])
        self.gathered.move_to(self.job.ctx.device)
        self.out.truncate_metrics(state["metrics_bytes"])
        self.saved_step = self.training.step
        self.reviewed = (self.training.step, self.gathered.train_seconds)
        own = checkpoint.path_of(self.out.checkpoints, self.saved_step)
        if process_group.is_main() and self.gathered.best_step == self.saved_step and own.is_file():
            checkpoint.link_best(own)  # a kill may have come between the checkpoint and its link

    def _take_over(self, state: dict[str, Any], memory: dict[str, torch.Tensor]) -> None:
        self.training.load(state)
        for name, tensor in self.job.memory.items():
            tensor.copy_(memory[name])

    def _config_digest(self, budget_seconds: float | None) -> str:
        """Return the digest of the configuration; of a run of seconds also after its end, when it says the steps."""
        if budget_seconds is None:
            return self.settings.digest()
        return self.settings.model_copy(update={"duration": Duration(seconds=budget_seconds)}).digest()

    def _circumstances(self) -> dict[str, Any]:
        """Return what must be equal for a resume to be equal bit for bit."""
        return self.job.ctx.circumstances() | {"cvlab": __version__, "processes": process_group.world().size}

    def _fit(self, stop: StopRequest) -> Iterator[Losses]:
        schedule = registry.get("schedule", self.settings.schedule.name, schedules.SCHEDULES.names)
        arguments = self.settings.schedule.arguments()

        def lr_factor(step: int) -> float:
            # the middle of the step, so that a schedule which starts or ends at 0 wastes none
            progress = self.gathered.plan.progress(step + 0.5)
            return schedules.warmed_up(schedule(progress, **arguments), progress, self.settings.warmup)

        return loop.fit(
            self.training,
            self.job.loss_fn,
            self.job.batch_at,
            lr_factor=lr_factor,
            ctx=self.job.ctx,
            clip_norm=self.settings.clip_norm,
            wishes=functools.partial(self._wishes, stop),
        )

    def run(self, stop: StopRequest) -> None:
        """Do the steps that are left. StoppedError, after a checkpoint, if a signal asked to stop."""
        with Progress(self.settings.name, self.gathered.total_steps, self.training.step) as progress:
            self._stop_if_asked(stop, max(collectives.all_gather_object(stop.received or 0)))
            steps = self._fit(stop)
            began = time.perf_counter()
            while self.training.step < self.gathered.total_steps:
                losses = next(steps)
                self.gathered.add(losses)
                step = self.training.step
                *asked_by, save_due = self._wishes(stop) if process_group.world().size == 1 else self.training.agreed
                if save_due or self._is_due(step):
                    self.job.ctx.synchronize()
                    self.gathered.train_seconds += time.perf_counter() - began
                    self._pause(step, save_due)
                    progress.total = self.gathered.total_steps
                    began = time.perf_counter()
                if progress.due():
                    progress.update(step, self.gathered.text(losses, step, self.job, time.perf_counter() - began))
                if any(asked_by):
                    self.gathered.train_seconds += time.perf_counter() - began
                    self._stop_if_asked(stop, StopRequest.SIGNALS[asked_by.index(True)])

    def _wishes(self, stop: StopRequest) -> list[bool]:
        """Return by which signal this process was asked to stop, and, in process 0, whether a save is due."""
        received = process_group.pending_signal(stop.received)
        return [*(received == number for number in StopRequest.SIGNALS), process_group.is_main() and self._save_due()]

    def _is_due(self, step: int) -> bool:
        logs = step % self.settings.log_every == 0
        return logs or self._review_due(step) or self._evaluation_due(step)

    def _review_due(self, step: int) -> bool:
        return self.settings.duration.seconds is not None and self.gathered.plan.is_reviewed(step)

    def _evaluation_due(self, step: int) -> bool:
        return step % (self.job.steps_per_epoch * self.settings.eval_every) == 0 or step == self.gathered.total_steps

    def _save_due(self) -> bool:
        since = time.monotonic() - self.saved_at
        return since >= max(self.settings.save_seconds, SAVE_SHARE * self.save_cost)

    def _pause(self, step: int, save_due: bool) -> None:
        """Between two steps: log, evaluate, save, whichever is due. The clock of the training stands still."""
        if step % self.settings.log_every == 0 or step == self.gathered.total_steps:
            self._log_losses(step)
        is_best = self._evaluation_due(step) and self._evaluate(step)
        corrected = self._review_due(step) and self._review(step)  # saved, so that a resume follows the same plan
        if is_best or corrected or save_due or step == self.gathered.total_steps:
            self.save(is_best)
        if self._evaluation_due(step) and step < self.gathered.total_steps:
            self._stop_if_pruned(step)

    def _review(self, step: int) -> bool:
        """Correct the plan of a run of seconds by the time that its steps have taken; whether that was needed."""
        seconds = self.settings.duration.seconds
        assert seconds is not None
        used = self.gathered.train_seconds
        recent = (used - self.reviewed[1]) / (step - self.reviewed[0])
        self.reviewed = (step, used)
        plan = self.gathered.plan.reviewed(step, time_budget.usable_seconds(seconds) - used, max(recent, used / step))
        changed = plan != self.gathered.plan
        self.gathered.follow(plan)
        return changed

    def record_duration(self) -> None:
        """Write the steps that a run of seconds became into config.yaml: `cvlab run` on it repeats them."""
        if self.settings.duration.seconds is None:
            return
        plan = self.gathered.plan
        duration = Duration(steps=plan.total, corrections=plan.corrections)
        self.settings = self.settings.model_copy(update={"duration": duration})
        self.out.write_text("config.yaml", self.settings.to_yaml())
        self.out.log(f"{plan.total} steps in {self.gathered.train_seconds:.2f} s of training")

    def _log_losses(self, step: int) -> None:
        means = {"train_loss" if name == "loss" else name: value for name, value in self.gathered.take_means().items()}
        self.gathered.metrics |= means
        lr = self.training.optimizer.param_groups[0]["lr"]
        self._append(step, {"lr": lr, **means})

    def _evaluate(self, step: int) -> bool:
        """Evaluate and log; return whether these weights are the best so far."""
        collectives.broadcast_buffers(self.training.evaluated)
        evaluated = self.job.evaluate(self.training.evaluated)
        found = collectives.broadcast_from_rank0(lambda: evaluated)
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

    def _stop_if_asked(self, stop: StopRequest, asked: int) -> None:
        """Save and raise StoppedError if all have agreed to stop."""
        if asked:
            stop.received = asked
            if self.saved_step != self.training.step:
                self.save()
            raise stop.error(self.training.step, self.out.path.name)

    def _stop_if_pruned(self, step: int) -> None:
        why = collectives.broadcast_from_rank0(lambda: read_prune(self.out.path))
        if why is not None:
            self.save()
            hint = f"remove {self.out.path / PRUNE} to go on by `cvlab resume`"
            raise StoppedError(f"pruned after step {step}: {why}", hint, EXIT_TERMINATED)

    def state(self) -> dict[str, Any]:
        """Return everything a resume needs."""
        return self.training.state() | {
            "format": FORMAT,
            "rng_of_others": collectives.all_gather_object(
                device.get_rng_state() if not process_group.is_main() else None
            )[1:],
            "gathered": vars(self.gathered).copy(),
            "memory": self.job.memory,
            "metrics_bytes": self.out.sync_metrics(),
            "config_sha256": self._config_digest(self.gathered.budget_seconds),
            "circumstances": self._circumstances(),
        }

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint of this step."""
        began = time.monotonic()
        state = self.state()
        if process_group.is_main():
            checkpoint.save(self.out.checkpoints, self.training.step, state, is_best)
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - began
        self.saved_step = self.training.step
        self.out.set_status("running", step=self.training.step, total_steps=self.gathered.total_steps)
