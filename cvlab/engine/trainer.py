"""Train a model in a run directory: start or resume, fit, log, evaluate, save, stop.

Every experiment that trains passes a `TrainTask`: its model, loss, batches and evaluation.
"""

import copy
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from cvlab import registry
from cvlab.config.metrics import require_finite
from cvlab.config.schema import Duration
from cvlab.console import Progress
from cvlab.distributed import collectives, process_group, sharding
from cvlab.distributed.step_flags import StepFlags
from cvlab.engine import compilation, device, loop, parameters, schedules, time_budget, unsaved_state
from cvlab.engine.anomaly import AnomalyRecorder
from cvlab.engine.checkpointer import Checkpointer
from cvlab.engine.config import PER_LAYER, TrainConfig
from cvlab.engine.gradient_log import GradientLog
from cvlab.engine.loop import Losses, TrainState
from cvlab.engine.progress import TrainProgress, logged_losses
from cvlab.engine.task import TrainTask
from cvlab.engine.time_budget import Plan
from cvlab.engine.unsaved_state import UnsavedState
from cvlab.errors import CheckpointError, ConfigError, DivergedError, StoppedError
from cvlab.runs import checkpoint, rung, user_code
from cvlab.runs.checkpoint import State
from cvlab.runs.interrupt import EXIT_TERMINATED, StopRequest
from cvlab.runs.records import PRUNE_FILE, pruning_reason
from cvlab.runs.run_dir import RunDir

MAX_STEPS = 10**9  # the names of checkpoints have nine digits

LOSS_SUMS = ("loss_sums", "epoch_loss_sums")  # of the progress; each rank has its own


def train(config: TrainConfig, task: TrainTask, run_dir: RunDir) -> tuple[nn.Module, dict[str, float]]:
    """Train to the end, from the latest checkpoint of the run directory if it has one.

    Args:
        config: The configuration of the run.
        task: Model, loss, data and evaluation.
        run_dir: Where metrics, log and checkpoints go; its lock is held.

    Returns:
        The trained model (the moving average of the weights if enabled), and the metrics by name.

    Raises:
        StoppedError: A signal was received, or a search ended the run early; a checkpoint has been written.
        DivergedError: A loss, a metric or a weight is not finite.
        CheckpointError: The run cannot be resumed.
    """
    with StopRequest() as stop:
        trainer = Trainer(config, task, run_dir, stop)
        trainer.begin()
        trainer.run()
    trainer.record_duration()
    trainer.report_early_stop()
    model = trainer.state.eval_model
    if trainer.state.is_schedule_free:
        run_dir.extra_summary["used_weights"] = "schedule-free average"
    elif config.ema is not None:
        run_dir.extra_summary["used_weights"] = "moving average" if trainer.state.uses_ema else "last step"
    run_dir.extra_summary["weights_sha256"] = checkpoint.weights_digest(model.state_dict())
    return model, trainer.progress.final_metrics(trainer.step, task)


def _hyperparameters(group: State) -> State:
    """Return what a group of parameters of an optimizer has beside its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def _has_shape_of(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Return whether state has the shape of its parameter, or is one number per row or column (Adafactor)."""
    pairs = zip(value.shape, parameter.shape, strict=False)
    return value.ndim == parameter.ndim and all(size in (1, full) for size, full in pairs)


class Trainer:
    """A training run in progress."""

    def __init__(self, config: TrainConfig, task: TrainTask, run_dir: RunDir, stop: StopRequest) -> None:
        self.config, self.task, self.run_dir, self.stop = config, task, run_dir, stop
        optimizer = parameters.build_optimizer(config, task.model)
        self.state = TrainState(task.model, optimizer, config.ema, task.ctx.make_scaler())
        self.forward_model = compilation.compile_model(task.model) if config.compile else task.model
        self.anomaly = AnomalyRecorder(task.model) if config.anomaly else None
        per_layer = config.log_gradients == PER_LAYER
        self.gradient_log = GradientLog(task.model, per_layer) if config.log_gradients else None
        self.progress = TrainProgress(0)
        self.checkpointer = Checkpointer(self, run_dir, task.ctx, config.save_seconds)
        # A run is not resumed if its data or its code has changed. The digests are those of what this run trains with.
        self.inputs = {"data": task.data_digest, "code": user_code.digest(config, run_dir.path)}
        self.last_replan = (0, 0.0)  # step and training time
        self.unsaved_state = UnsavedState(task.model) if process_group.is_main() else None

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state.step

    @property
    def total_steps(self) -> int:
        """Number of steps planned."""
        return self.progress.total_steps

    @property
    def best_step(self) -> int | None:
        """Step with the best evaluation so far, None before the first one."""
        return self.progress.best_step or None

    def begin(self) -> None:
        """Restore the latest checkpoint, or plan the run and write a checkpoint before the first step."""
        size = process_group.world().size
        self.config.require_shares(size)
        self.config.require_validation(self.task.monitor.startswith("val_"))
        self._require_rung()
        sharding.require_divisible(self.task.items_per_step, size)  # less than batch_size if there is less data
        self.config.require_parts(self.task.items_per_step, size)
        if self.config.compile:
            seconds = compilation.warm_up(self.task, self.forward_model)
            self.run_dir.log(f"compiled the model in {seconds:.1f} s, not counted as training")
        self.checkpointer.begin(self._start)

    def _require_rung(self) -> None:
        """Raise ConfigError if a search is to compare runs before their ends, but they are evaluated only there."""
        interval = self.task.steps_per_epoch * self.config.eval_every
        total = self.config.duration.num_steps(self.task.steps_per_epoch)
        if total <= interval and rung.read(self.run_dir.path) is not None:
            message = f"search.asha: the first evaluation, after {interval} steps, is not before the end at {total}"
            raise ConfigError(message, "lower eval_every, or raise the duration")

    def _start(self) -> None:
        if not process_group.is_main():  # what a rank draws, for example for dropout, is its own
            device.seed_everything(sharding.rank_seed(self.config.seed))
        self.progress.set_plan(self._first_plan())

    def _first_plan(self) -> Plan:
        duration = self.config.duration
        if duration.steps is not None:
            return Plan(duration.steps, duration.plan_history)
        if duration.epochs is not None:
            return Plan(duration.epochs * self.task.steps_per_epoch)
        assert duration.seconds is not None
        self.progress.budget_seconds = duration.seconds
        return self._plan_seconds(duration.seconds)

    def _plan_seconds(self, seconds: float) -> Plan:
        """Measure the time of a step, restore the state, and plan the steps that fit into the budget."""
        before, extra_state = copy.deepcopy((self.state.state_dict(), self.task.extra_state))
        self.progress.total_steps = MAX_STEPS  # so that the schedule is at its start

        def steps() -> Iterator[Losses]:
            for losses in self._fit():
                self.stop.raise_if_set(0, self.run_dir.path.name)
                yield losses

        typical = time_budget.seconds_per_step(steps(), seconds, self.task.ctx.synchronize)
        self._load(before, extra_state)
        plan = time_budget.first_plan(seconds, typical)
        self.run_dir.log(
            f"{seconds:g} s of training (loading, evaluation and saving not counted): a step takes "
            f"{1000 * typical:.1f} ms, so about {plan.total_steps} steps; the plan is updated during training"
        )
        return plan

    def state_dict(self) -> State:
        """Return everything that the remaining steps depend on."""
        of_rank = {"rng": device.get_rng_state(), **{name: getattr(self.progress, name) for name in LOSS_SUMS}}
        other_ranks = collectives.all_gather_object(of_rank if not process_group.is_main() else None)[1:]
        return self.state.state_dict() | {
            "other_ranks": other_ranks,
            "progress": vars(self.progress).copy(),
            "extra_state": self.task.extra_state,
            "inputs": self.inputs,
        }

    def _require_same_inputs(self, state: State, path: Path) -> None:
        """Raise CheckpointError if the data or user code has changed since a checkpoint, unless that is allowed."""
        changed = [name for name, digest in self.inputs.items() if digest != state["inputs"][name]]
        if not changed:
            return
        what = " and ".join({"data": "the data", "code": "the code of the model or data set"}[name] for name in changed)
        if not self.run_dir.allow_changes:
            raise CheckpointError(
                f"{path}: {what} changed after the run began; resuming would mix both versions",
                f"`cvlab resume {self.run_dir.path.name} --allow-changes` continues nevertheless",
            )
        self.run_dir.log(f"warning: {what} changed after the run began")
        self.run_dir.extra_summary["changed_inputs"] = changed

    def load_state_dict(self, state: State, path: Path) -> None:
        """Restore what `state_dict` returned."""
        self._require_same_inputs(state, path)
        checkpoint.match_model(self.state.model, state["model"], path)
        groups = [_hyperparameters(group) for group in self.state.optimizer.param_groups]
        self._load(state, state["extra_state"])
        self._check_optimizer(groups, path)
        self.progress = TrainProgress(**state["progress"])
        self.progress.check()
        self._check_plan(path)
        rank = process_group.world().rank
        if rank and rank <= len(state["other_ranks"]):
            of_rank = state["other_ranks"][rank - 1]
            device.set_rng_state(of_rank["rng"])
            for name in LOSS_SUMS:
                setattr(self.progress, name, of_rank[name])
        self.progress.move_to(self.task.ctx.device)
        self.last_replan = (self.step, self.progress.train_seconds)

    def _check_optimizer(self, groups: list[State], path: Path) -> None:
        """Raise CheckpointError unless the restored optimizer has its hyperparameters and state of its shapes."""
        optimizer = self.state.optimizer
        for expected, group in zip(groups, optimizer.param_groups, strict=True):
            checkpoint.check_types(expected, _hyperparameters(group), path, "optimizer")
            for parameter in group["params"]:
                for name, value in optimizer.state.get(parameter, {}).items():
                    is_valid = value is None or isinstance(value, (int, float))
                    if isinstance(value, torch.Tensor):
                        is_valid = value.numel() == 1 or _has_shape_of(value, parameter)
                    if not is_valid:
                        raise CheckpointError(f"{path}: optimizer.{name} has another shape", "the file was changed")

    def _check_plan(self, path: Path) -> None:
        """Raise CheckpointError unless the number of steps is that of the configuration, or a budget's."""
        duration = self.config.duration
        expected = duration.steps if duration.epochs is None else duration.epochs * self.task.steps_per_epoch
        if self.progress.budget_seconds is not None or expected is None:
            expected = min(self.total_steps, MAX_STEPS)
        if self.total_steps != expected:
            raise CheckpointError(f"{path}: {self.total_steps} steps instead of {expected}", "the file was changed")

    def _load(self, state: State, extra_state: dict[str, torch.Tensor]) -> None:
        self.state.load_state_dict(state)
        for name, tensor in self.task.extra_state.items():
            tensor.copy_(extra_state[name])

    def config_digest(self, state: State) -> str:
        """Return the digest of the configuration that the run started with: `record_duration` changes its duration."""
        budget_seconds = state["progress"]["budget_seconds"]
        if budget_seconds is None:
            return self.config.digest()
        return self.config.model_copy(update={"duration": Duration(seconds=budget_seconds)}).digest()

    def _fit(self) -> Iterator[Losses]:
        schedule = registry.get("schedule", self.config.schedule.name, schedules.SCHEDULES.names)
        arguments = self.config.schedule.builder_arguments()

        def lr_factor(step: int) -> float:
            # the middle of the step, so that a schedule which starts or ends at 0 wastes none
            progress = self.progress.plan.progress(step + 0.5)
            if self.config.schedule.name == schedules.PLATEAU:
                arguments["num_reductions"] = self.progress.lr_reductions
            return schedules.warmed_up(schedule(progress, **arguments), progress, self.config.warmup)

        return loop.fit(
            self.state,
            self.task.loss_fn,
            self.task.get_batch,
            lr_factor=lr_factor,
            ctx=dataclasses.replace(self.task.ctx, read_every=1) if self.anomaly else self.task.ctx,
            clip_norm=self.config.clip_norm,
            local_flags=self._local_flags,
            forward_model=self.forward_model,
            split_batch=self.task.split_batch,
            attack=self.task.attack,
            anomaly=self.anomaly,
            gradient_log=self.gradient_log,
            sam=self.config.sam,
        )

    def run(self) -> None:
        """Take the remaining steps. Raises StoppedError, after a checkpoint, if any rank has received a signal."""
        with Progress(self.config.name, self.total_steps, self.step) as bar:
            self._stop_if(max(collectives.all_gather_object(self.stop.received or 0)))
            if self.step and self._evaluation_due(self.step) and not self._is_last(self.step):
                self._stop_at_rung(self.step)
            steps = self._fit()
            start = time.perf_counter()
            while not self._is_last(self.step):
                losses = next(steps)
                self._report_unsaved_state()
                self.progress.add_losses(losses)
                step, flags = self.step, self.state.any_rank_flags
                if flags.save or self._is_due(step):
                    self.task.ctx.synchronize()
                    self.progress.train_seconds += time.perf_counter() - start
                    self._between_steps(step, flags.save)
                    bar.total = self.total_steps
                    start = time.perf_counter()
                if bar.due():
                    bar.update(step, self.progress.text(losses, step, self.task, time.perf_counter() - start))
                if flags.stop:
                    self.progress.train_seconds += time.perf_counter() - start
                    self._stop_if(flags.stop)

    def _report_unsaved_state(self) -> None:
        """Warn, after the first steps, about state of the model that no checkpoint has."""
        if self.unsaved_state is None:
            return
        names = self.unsaved_state.observe_step(is_last=self.step == self.total_steps)
        if names is not None:
            self.unsaved_state = None
            if names:
                self.run_dir.log(unsaved_state.warning(names))

    def _local_flags(self) -> StepFlags:
        """Return the signal that this rank has received and, on rank 0, whether a checkpoint is due."""
        received = process_group.pending_signal(self.stop.received)
        return StepFlags(received or 0, process_group.is_main() and self.checkpointer.schedule.is_due())

    def _is_due(self, step: int) -> bool:
        logs = step % self.config.log_every == 0
        return logs or self._ends_epoch(step) or self._replan_due(step) or self._evaluation_due(step)

    def _ends_epoch(self, step: int) -> bool:
        """Return whether an epoch ends with a step; a run that is shorter than an epoch has one that ends with it."""
        is_short = step == self.total_steps and not self.progress.epoch_losses
        return is_short or step % self.task.steps_per_epoch == 0

    def _replan_due(self, step: int) -> bool:
        return self.config.duration.seconds is not None and self.progress.plan.is_replanned_after(step)

    def _evaluation_due(self, step: int) -> bool:
        return step % (self.task.steps_per_epoch * self.config.eval_every) == 0 or step == self.total_steps

    def _is_last(self, step: int) -> bool:
        return step == self.total_steps or bool(self.progress.stop_reason)

    def _between_steps(self, step: int, save_due: bool) -> None:
        """Log, evaluate, replan and save, whichever is due; this is not counted as training time."""
        self.state.unread.require_finite()
        if step % self.config.log_every == 0 or step == self.total_steps:
            self._log_losses(step)
        if self._ends_epoch(step):
            self.progress.end_epoch()
        is_best = self._evaluation_due(step) and self._evaluate(step)
        is_changed = self._replan_due(step) and self._replan(step)  # saved, so that a resume follows the same plan
        is_last = self._is_last(step)
        if is_last and self.progress.loss_steps:
            self._log_losses(step)
        if is_best or is_changed or save_due or is_last:
            self.checkpointer.save(is_best)
        if self._evaluation_due(step) and not is_last:
            self._stop_if_pruned(step)

    def _replan(self, step: int) -> bool:
        """Update the plan of a time budget from the time that steps have taken; return whether it has changed."""
        seconds = self.config.duration.seconds
        assert seconds is not None
        used = self.progress.train_seconds
        recent = (used - self.last_replan[1]) / (step - self.last_replan[0])
        self.last_replan = (step, used)
        plan = self.progress.plan.replan(step, time_budget.usable_seconds(seconds) - used, max(recent, used / step))
        is_changed = plan != self.progress.plan
        self.progress.set_plan(plan)
        return is_changed

    def report_early_stop(self) -> None:
        """Log why the run has ended before its last step, if it has."""
        if self.progress.stop_reason:
            self.run_dir.log(f"stopped after step {self.step} of {self.total_steps}: {self.progress.stop_reason}")
            self.run_dir.extra_summary["stopped_early"] = self.progress.stop_reason

    def record_duration(self) -> None:
        """Write the steps of a time budget into config.yaml, so that `cvlab run` on it repeats them."""
        if self.config.duration.seconds is None:
            return
        plan = self.progress.plan
        duration = Duration(steps=plan.total_steps, plan_history=plan.history)
        self.config = self.config.model_copy(update={"duration": duration})
        self.run_dir.write_text("config.yaml", self.config.to_yaml())
        self.run_dir.log(f"{plan.total_steps} steps in {self.progress.train_seconds:.2f} s of training")

    def _log_losses(self, step: int) -> None:
        means = logged_losses(self.progress.take_mean_losses())
        lr = self.state.optimizer.param_groups[0]["lr"]
        self._append(step, {"lr": lr, **means})

    def _evaluate(self, step: int) -> bool:
        """Evaluate and log; return whether these weights are the best so far."""
        metrics = self._measure(self.state.eval_model)
        is_best = self.progress.add_evaluation(step, metrics.get(self.task.monitor))
        if not is_best and step < self.total_steps:
            self._react_to_stale_metric()
        if self._is_last(step) and self.state.uses_ema and self.config.ema is not None:
            chosen = self._choose_weights(metrics)
            if chosen is not metrics:
                metrics = chosen
                is_best |= self.progress.add_evaluation(step, metrics[self.task.monitor])
        self._append(step, metrics)
        self.progress.metrics |= metrics
        return is_best

    def _react_to_stale_metric(self) -> None:
        """End the run after `patience` evaluations without a better one; reduce the learning rate of `plateau`."""
        progress, schedule = self.progress, self.config.schedule
        if self.config.patience is not None and progress.stale_evaluations >= self.config.patience:
            progress.stop_reason = (
                f"{self.task.monitor} has not improved in {progress.stale_evaluations} evaluations "
                f"since step {progress.best_step}"
            )
        if schedule.name == schedules.PLATEAU and (
            progress.stale_evaluations_at_lr >= schedule.builder_arguments()["patience"]
        ):
            progress.stale_evaluations_at_lr = 0
            progress.lr_reductions += 1

    def _measure(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of a model, the same on all ranks."""
        collectives.broadcast_buffers(model)
        try:
            local_metrics = self.task.evaluate(model)
            require_finite(local_metrics)
        except DivergedError as error:
            raise DivergedError(f"{error.message} at step {self.step}", "lower optimizer.lr") from error
        return collectives.broadcast_from_rank0(lambda: local_metrics)

    def _choose_weights(self, metrics: dict[str, float]) -> dict[str, float]:
        """Use the last weights instead of their average if they are better on validation; return the metrics.

        An average is worse where it still contains much of the first steps. Without validation it is used in any case.
        """
        monitor = self.task.monitor
        if monitor.startswith("val_") and monitor in metrics:
            of_last_weights = self._measure(self.state.model)
            if of_last_weights[monitor] > metrics[monitor]:
                self.state.uses_ema = False
                self.run_dir.log(
                    f"{monitor} {of_last_weights[monitor]:.4g} of the last weights, {metrics[monitor]:.4g} of their "
                    "moving average: the last weights are used"
                )
                metrics = of_last_weights
        return metrics

    def _append(self, step: int, values: dict[str, float]) -> None:
        seconds = round(self.progress.train_seconds, 4)
        self.run_dir.append({"step": step, "epoch": step / self.task.steps_per_epoch, "seconds": seconds, **values})

    def _stop_if(self, received: int) -> None:
        """Save and raise StoppedError if any rank has received a signal."""
        if received:
            self.stop.received = received
            self.checkpointer.save_and_stop(self.stop)

    def _stop_if_pruned(self, step: int) -> None:
        reason = collectives.broadcast_from_rank0(lambda: pruning_reason(self.run_dir.path))
        if reason is not None:
            self.checkpointer.save()
            hint = f"remove {self.run_dir.path / PRUNE_FILE} to continue with `cvlab resume`"
            raise StoppedError(f"pruned after step {step}: {reason}", hint, EXIT_TERMINATED)
        self._stop_at_rung(step)

    def _stop_at_rung(self, step: int) -> None:
        """Save and stop after an evaluation if a search has granted the run no more than this."""
        path = self.run_dir.path
        limit = collectives.broadcast_from_rank0(lambda: rung.read(path))
        if limit is None or not limit.is_reached({"step": step, "epoch": step / self.task.steps_per_epoch}):
            return
        if limit.metric not in self.progress.metrics:
            names = ", ".join(self.progress.metrics)
            raise ConfigError(f"{limit.metric} is not measured during the training", f"search.metric: one of {names}")
        self.checkpointer.save()
        hint = f"remove {path / rung.FILE} to continue with `cvlab resume`"
        raise StoppedError(f"paused after step {step}, at rung {limit.number + 1} of the search", hint, EXIT_TERMINATED)
