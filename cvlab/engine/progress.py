"""What a training knows besides its weights: how long it is planned, what it has measured; part of every checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cvlab.distributed import collectives, process_group
from cvlab.engine.task import TrainTask
from cvlab.engine.time_budget import Correction, Plan


def missing_keys(own: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """Return the keys that a state lacks, dotted, down to the second level where its keys are always the same."""
    missing = [key for key in own if key not in state]
    for key in {"rng", "gathered", "circumstances", "memory"}.difference(missing):
        missing += [f"{key}.{part}" for part in own[key] if part not in state[key]]
    return missing


@dataclass
class TrainProgress:
    """What a run knows besides its weights; part of every checkpoint."""

    total_steps: int
    corrections: tuple[Correction, ...] = ()
    budget_seconds: float | None = None
    train_seconds: float = 0.0
    loss_sums: dict[str, Tensor] = field(default_factory=dict)
    loss_steps: int = 0
    best_value: float | None = None
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """How many steps there are, and how far along each is."""
        return Plan(self.total_steps, self.corrections)

    def follow(self, plan: Plan) -> None:
        """Take over a plan."""
        self.total_steps, self.corrections = plan.total, plan.corrections

    def move_to(self, device: torch.device) -> None:
        """Put the sums of losses on a device."""
        self.loss_sums = {name: value.to(device) for name, value in self.loss_sums.items()}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add up the losses of a step, on the device: reading a number would make it wait."""
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums[name] + value if name in self.loss_sums else value
        self.loss_steps += 1

    def final_metrics(self, step: int, job: TrainTask) -> dict[str, float]:
        """Return the metrics of the last evaluation and what `step` steps have cost."""
        assert self.best_value is not None, "the last step is always evaluated"
        return self.metrics | {
            f"best_{job.monitor}": self.best_value,
            "best_step": self.best_step,
            "steps": step,
            "epochs": step / job.steps_per_epoch,
            "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
            "train_seconds": self.train_seconds,
            "images_per_second": step * job.items_per_step / max(self.train_seconds, 1e-9),
        }

    def text(self, losses: Mapping[str, Tensor], step: int, job: TrainTask, since: float) -> str:
        """Say how a training goes: losses, last evaluation, images per second; `since` is seconds not yet counted."""
        rate = step * job.items_per_step / max(self.train_seconds + since, 1e-9)
        parts = [f"{name} {value.item():.3f}" for name, value in losses.items()]
        parts += [f"{job.monitor} {self.metrics[job.monitor]:.3f}"] if job.monitor in self.metrics else []
        return "  ".join([*parts, f"{rate:,.0f} images/s"])

    def take_means(self) -> dict[str, float]:
        """Return the mean losses since the last time, over all processes."""
        sums = collectives.all_reduce_sums(self.loss_sums)
        means = {name: value.item() / (self.loss_steps * process_group.world().size) for name, value in sums.items()}
        self.loss_sums, self.loss_steps = {}, 0
        return means
