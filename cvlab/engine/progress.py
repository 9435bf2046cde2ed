"""Training progress that is checkpointed with the weights: planned steps, running losses, best metric."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cvlab.distributed import collectives, process_group
from cvlab.engine.task import TrainTask
from cvlab.engine.time_budget import Plan, PlanHistory


@dataclass
class TrainProgress:
    """What a training run has planned and measured so far."""

    total_steps: int
    plan_history: PlanHistory = ()
    budget_seconds: float | None = None
    train_seconds: float = 0.0
    loss_sums: dict[str, Tensor] = field(default_factory=dict)
    loss_steps: int = 0
    best_value: float | None = None
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

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

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a step, on the device: reading a number would wait for it."""
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums[name] + value if name in self.loss_sums else value
        self.loss_steps += 1

    def take_mean_losses(self) -> dict[str, float]:
        """Return the mean losses since the last call, over all ranks."""
        sums = collectives.all_reduce_sums(self.loss_sums)
        means = {name: value.item() / (self.loss_steps * process_group.world().size) for name, value in sums.items()}
        self.loss_sums, self.loss_steps = {}, 0
        return means

    def final_metrics(self, step: int, task: TrainTask) -> dict[str, float]:
        """Return the metrics of the last evaluation and the cost of `step` steps."""
        assert self.best_value is not None, "the last step is always evaluated"
        return self.metrics | {
            f"best_{task.monitor}": self.best_value,
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
        parts = [f"{name} {value.item():.3f}" for name, value in losses.items()]
        parts += [f"{task.monitor} {self.metrics[task.monitor]:.3f}"] if task.monitor in self.metrics else []
        return "  ".join([*parts, f"{rate:,.0f} images/s"])
