"""Training progress that is checkpointed with the weights: planned steps, running losses, best metric."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from cvlab.distributed import collectives, process_group
from cvlab.engine.task import TrainTask
from cvlab.engine.time_budget import Plan, PlanHistory

Value = TypeVar("Value")


@dataclass
class TrainProgress:
    """What a training run has planned and measured so far."""

    total_steps: int
    plan_history: PlanHistory = ()
    budget_seconds: float | None = None
    train_seconds: float = 0.0
    loss_sums: dict[str, Tensor] = field(default_factory=dict)  # since the last row of metrics.jsonl
    loss_steps: int = 0
    epoch_loss_sums: dict[str, Tensor] = field(default_factory=dict)  # since the start of the epoch
    epoch_loss_steps: int = 0
    epoch_losses: dict[str, float] = field(default_factory=dict)  # means of the last complete epoch
    best_value: float | None = None
    best_step: int = 0
    stale_evaluations: int = 0  # since the best one
    stale_evaluations_at_lr: int = 0  # since the best one or the last reduction of the learning rate
    lr_reductions: int = 0  # by the schedule `plateau`
    stop_reason: str = ""  # why the run has ended before its last step
    metrics: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError if a value that was restored is not of its type."""
        sums = [*self.loss_sums.values(), *self.epoch_loss_sums.values()]
        if not all(isinstance(value, Tensor) and value.numel() == 1 for value in sums):
            raise ValueError("sums of losses are not scalars")
        optional = [value for value in (self.best_value, self.budget_seconds) if value is not None]
        numbers = [*self.epoch_losses.values(), *self.metrics.values(), *optional]
        if not all(isinstance(value, (int, float)) for value in numbers):
            raise ValueError("metrics are not numbers")
        if not all(len(pair) == 2 and all(isinstance(step, int) for step in pair) for pair in self.plan_history):
            raise ValueError("plan_history has no pairs of steps")

    @property
    def plan(self) -> Plan:
        """The number of steps and how it came about."""
        return Plan(self.total_steps, self.plan_history)

    def set_plan(self, plan: Plan) -> None:
        """Follow a plan from now on."""
        self.total_steps, self.plan_history = plan.total_steps, plan.history

    def move_to(self, device: torch.device) -> None:
        """Move the sums of losses to a device."""
        self.loss_sums = {name: value.to(device) for name, value in self.loss_sums.items()}
        self.epoch_loss_sums = {name: value.to(device) for name, value in self.epoch_loss_sums.items()}

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a step, on the device: reading a number would wait for it."""
        for sums in (self.loss_sums, self.epoch_loss_sums):
            for name, value in losses.items():
                sums[name] = sums[name] + value if name in sums else value
        self.loss_steps += 1
        self.epoch_loss_steps += 1

    def take_mean_losses(self) -> dict[str, float]:
        """Return the mean losses since the last call, over all ranks."""
        means = _mean_losses(self.loss_sums, self.loss_steps)
        self.loss_sums, self.loss_steps = {}, 0
        return means

    def end_epoch(self) -> None:
        """Keep the mean losses of the epoch, over all ranks, and start the next one."""
        self.epoch_losses = _mean_losses(self.epoch_loss_sums, self.epoch_loss_steps)
        self.epoch_loss_sums, self.epoch_loss_steps = {}, 0

    def add_evaluation(self, step: int, value: float | None) -> bool:
        """Count an evaluation after a step; return whether its value of the monitored metric is the best so far.

        None, where the metric is undefined on the data, counts as best: the last weights are then the best ones.
        """
        if value is not None and self.best_value is not None and value <= self.best_value:
            self.stale_evaluations += 1
            self.stale_evaluations_at_lr += 1
            return False
        self.best_value, self.best_step = value, step
        self.stale_evaluations = self.stale_evaluations_at_lr = 0
        return True

    def final_metrics(self, step: int, task: TrainTask) -> dict[str, float]:
        """Return the losses of the last epoch, the metrics of the last evaluation, and the cost of `step` steps."""
        best = {f"best_{task.monitor}": self.best_value} if self.best_value is not None else {}
        losses = logged_losses(_of_whole_model(self.epoch_losses))
        return {
            **losses,
            **self.metrics,
            **best,
            "best_step": self.best_step,
            "steps": step,
            "epochs": step / task.steps_per_epoch,
            "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
            "train_seconds": self.train_seconds,
            "images_per_second": step * task.items_per_step / max(self.train_seconds, 1e-9),
        }

    def text(self, losses: Mapping[str, Tensor], step: int, task: TrainTask, uncounted_seconds: float) -> str:
        """Return losses, last evaluation and images per second for the progress bar."""
        rate = step * task.items_per_step / max(self.train_seconds + uncounted_seconds, 1e-9)
        parts = [f"{name} {value.item():.3f}" for name, value in _of_whole_model(losses).items()]
        parts += [f"{task.monitor} {self.metrics[task.monitor]:.3f}"] if task.monitor in self.metrics else []
        return "  ".join([*parts, f"{rate:,.0f} images/s"])


def _of_whole_model(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values without those of single layers, `NAME/LAYER`, which are in metrics.jsonl only."""
    return {name: value for name, value in values.items() if "/" not in str(name)}


def logged_losses(means: Mapping[str, float]) -> dict[str, float]:
    """Return mean losses by the names they are logged as: `train_loss` is the loss without the regularization `reg`."""
    named = {"train_loss" if name == "loss" else name: value for name, value in means.items()}
    if "train_loss" in named and "reg" in named:
        named["train_loss"] -= named["reg"]
    return named


def _mean_losses(sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
    """Return the means over all ranks of losses that were summed over a number of steps."""
    totals = collectives.all_reduce_sums(sums)
    return {name: value.item() / (steps * process_group.world().size) for name, value in totals.items()}
