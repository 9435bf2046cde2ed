"""What every training is told: its configuration's common keys, and the `Job` that an experiment hands over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cvlab.engine import loop
from cvlab.engine.device import ComputeContext

SAVE_SHARE = 50  # a save may cost 1/50 of the time between two saves


@dataclass(frozen=True)
class TrainTask:
    """What an experiment wants trained.

    `batch_at(step)` gives the batch of a step; `evaluate(model)` the metrics of an evaluation, one of which,
    `monitor`, says which weights are best (higher is better). `memory` are tensors which the batches or the loss change
    from step to step, in place; they are part of every checkpoint.
    """

    model: nn.Module
    loss_fn: loop.LossFn[Any]
    batch_at: Callable[[int], Any]
    steps_per_epoch: int
    items_per_step: int
    evaluate: Callable[[nn.Module], dict[str, float]]
    monitor: str
    ctx: ComputeContext
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportSpec:
    """A trained net for other programs.

    `net` takes images in [0, 1] like `example` (1, C, H, W) and gives `outputs`, by name; without any it has no graph
    of its own, and only its `weights` can be taken. `about` says what it takes and gives, and its classes.
    """

    net: nn.Module
    weights: nn.Module
    example: Tensor
    outputs: tuple[str, ...]
    about: dict[str, Any]
