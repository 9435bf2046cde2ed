"""What an experiment gives to the engine: a task to train, or a trained model to export."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cvlab.engine import loop
from cvlab.engine.device import ComputeContext


@dataclass(frozen=True)
class TrainTask:
    """Model, loss, data and evaluation of a training run.

    Attributes:
        model: The model to train, on the device of `ctx`.
        loss_fn: Called as `loss_fn(model, batch)`; returns scalars by name, of which `loss` is minimized.
        get_batch: Returns the batch of a step, a pure function of it.
        steps_per_epoch: Number of steps in one pass over the training data.
        items_per_step: Number of training items of a step, over all ranks.
        evaluate: Returns the metrics of a model by name.
        monitor: The metric by which the best weights are chosen; higher is better.
        ctx: Device and precision.
        extra_state: Tensors that the batches or the loss change in place from step to step; saved in every checkpoint.
        split_batch: Returns the equal parts of a batch that go through the model one after another; None: it is one.
        attack: Called as `attack(model, batch, step)` with the model in evaluation mode; returns the examples to train
            on instead of a batch. A function of the weights and the step; None: the batches are trained on.
        data_digest: The digest of the data; a run is not resumed on other data.
    """

    model: nn.Module
    loss_fn: loop.LossFn[Any]
    get_batch: Callable[[int], Any]
    steps_per_epoch: int
    items_per_step: int
    evaluate: Callable[[nn.Module], dict[str, float]]
    monitor: str
    ctx: ComputeContext
    extra_state: dict[str, Tensor] = field(default_factory=dict)
    split_batch: Callable[[Any], Sequence[Any]] | None = None
    attack: Callable[[nn.Module, Any, int], Any] | None = None
    data_digest: str = ""


@dataclass(frozen=True)
class ExportSpec:
    """A trained model for other programs.

    Attributes:
        model: Takes images in [0, 1] like `example` and returns the tensors that `outputs` names.
        weights: The module whose weights are exported.
        example: An input, (1, C, H, W).
        outputs: Names of the model's outputs; empty if the model has no graph to export, only weights.
        metadata: What the model takes and returns, and its classes.
    """

    model: nn.Module
    weights: nn.Module
    example: Tensor
    outputs: tuple[str, ...]
    metadata: dict[str, Any]
