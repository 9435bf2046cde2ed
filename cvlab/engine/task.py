"""What every training is told: its configuration's common keys, and the `Job` that an experiment hands over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from cvlab.config.schema import BelowOne, Count, Duration, Fraction, Frozen, NonNegative, Part, Positive, RunConfig
from cvlab.distributed import process_group
from cvlab.engine import loop, optimizers
from cvlab.engine.loop import Compute
from cvlab.errors import ConfigError

AUTO = "auto"
SAVE_SHARE = 50  # a save may cost 1/50 of the time between two saves


class Profile(Frozen):
    """One size of an experiment that comes in several."""

    epochs: NonNegative = Field(description="chosen where the budget is enough for so many passes over the images")
    set: dict[str, Any] = Field({}, description="dotted keys and their values, laid over the file")


class TrainConfig(RunConfig):
    """The keys of every experiment that trains."""

    profile: str = Field(AUTO, description="one of `profiles`; auto: measure, and take the last that the budget allows")
    profiles: dict[str, Profile] = Field({}, description="sizes of the experiment by name, the smallest first")

    optimizer: Annotated[Part, optimizers.OPTIMIZERS] = Field(description="name and its parameters")
    schedule: Annotated[Part, optimizers.SCHEDULES] = Field(Part(name="constant"), description="of the learning rate")
    warmup: Fraction = Field(0.0, description="share of the run over which the learning rate rises from 0")
    batch_size: Count = Field(description="images per step")
    duration: Duration = Field(description="exactly one of steps, epochs, seconds")
    clip_norm: Positive | None = Field(None, description="largest norm of the gradient")
    ema: BelowOne | None = Field(None, description="decay of a running average of the weights, which is evaluated")
    eval_every: Count = Field(1, description="epochs between two evaluations")
    log_every: Count = Field(10, description="steps between two rows of metrics.jsonl")
    save_seconds: NonNegative = Field(60.0, description="at least so long between two checkpoints")

    @model_validator(mode="after")
    def _can_choose(self) -> "TrainConfig":
        if self.profiles and self.profile == AUTO and self.duration.seconds is None:
            raise ValueError(f"auto needs a budget in duration.seconds; else name one of {', '.join(self.profiles)}")
        return self

    def require_shares(self, processes: int) -> None:
        """Raise ConfigError unless so many processes can train it."""
        process_group.require_shares(self.batch_size, processes)
        if processes > 1 and self.duration.seconds is not None:
            raise ConfigError("duration.seconds: several processes need a number of steps", "give steps or epochs")


@dataclass(frozen=True)
class Job:
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
    where: Compute
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """A trained net for other programs.

    `net` takes images in [0, 1] like `example` (1, C, H, W) and gives `outputs`, by name; without any it has no graph
    of its own, and only its `weights` can be taken. `about` says what it takes and gives, and its classes.
    """

    net: nn.Module
    weights: nn.Module
    example: Tensor
    outputs: tuple[str, ...]
    about: dict[str, Any]
