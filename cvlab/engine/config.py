"""Configuration keys that all training experiments share."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from cvlab.config.metrics import Metric
from cvlab.config.schema import (
    ComponentConfig,
    Duration,
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunConfig,
)
from cvlab.distributed import sharding
from cvlab.engine import optimizers, schedules
from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from cvlab.engine.device import ComputeContext

TRAIN_METRICS = (  # of every training run
    Metric("train_loss", better="lower"),
    Metric("best_step"),
    Metric("steps"),
    Metric("epochs"),
    Metric("parameters", better="lower"),
    Metric("train_seconds", "s", "lower"),
    Metric("images_per_second", "1/s", "higher"),
)


class TrainConfig(RunConfig):
    """Configuration of an experiment that trains."""

    optimizer: Annotated[ComponentConfig, optimizers.OPTIMIZERS] = Field(description="name and its parameters")
    schedule: Annotated[ComponentConfig, schedules.SCHEDULES] = Field(
        ComponentConfig(name="constant"), description="schedule of the learning rate"
    )
    warmup: Fraction = Field(0.0, description="share of the run over which the learning rate rises from 0")
    batch_size: PositiveInt = Field(description="items per step, over all processes")
    duration: Duration = Field(description="exactly one of steps, epochs, seconds")
    clip_norm: PositiveFloat | None = Field(None, description="largest L2 norm of the gradient; null: no limit")
    ema: FractionBelowOne | None = Field(
        None, description="decay of the moving average of the weights, which is evaluated; null: none"
    )
    freeze: tuple[str, ...] = Field(
        (), description="patterns of names of parameters that are not trained, for example 'blocks.*'"
    )
    lr_factors: dict[str, PositiveFloat] = Field(
        {}, description="factors of the learning rate by patterns of names of parameters; those of all matches multiply"
    )
    patience: PositiveInt | None = Field(
        None, description="stop after N evaluations without a better validation metric; null: train to the end"
    )
    eval_every: PositiveInt = Field(1, description="epochs between two evaluations")
    log_every: PositiveInt = Field(10, description="steps between two rows of metrics.jsonl")
    save_seconds: NonNegativeFloat = Field(60.0, description="minimum seconds between two checkpoints")
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(  # type: ignore[assignment]
        "auto", description="auto: bfloat16 if the device is fast at it, else float16 on a GPU that is, else float32"
    )
    compile: bool = Field(
        False, description="compile the model's forward and backward pass with torch.compile, before the first step"
    )
    deterministic: bool = Field(
        True, description="on CUDA, give bit-for-bit identical runs; false: cuDNN chooses its algorithms by measuring"
    )

    anomaly: bool = Field(
        False, description="name the layer that returns the first value that is not finite; slower, for debugging"
    )
    log_gradients: bool = Field(
        False, description="log grad_norm, before clipping, and update_ratio, the L2 norm of a step / of the weights"
    )

    @model_validator(mode="after")
    def _check_anomaly(self) -> "TrainConfig":
        if self.anomaly and self.compile:
            raise ValueError("anomaly: a compiled model has no layers to observe; set compile: false")
        return self

    @property
    def final_phase(self) -> tuple[str, int]:
        """Name and number of the last epochs whose steps do other work than those before; none of them by default."""
        return "", 0

    def compute_context(self) -> "ComputeContext":
        """Return device, precision and threads of the training. Raises DeviceError."""
        from cvlab.engine import device

        return device.select_device(
            self.device, self.precision, self.threads, scales_loss=True, deterministic=self.deterministic
        )

    def require_validation(self, has_validation: bool) -> None:
        """Raise ConfigError if a validation metric is needed and there is no validation split."""
        key = "patience" if self.patience is not None else f"schedule {schedules.PLATEAU}"
        if not has_validation and (self.patience is not None or self.schedule.name == schedules.PLATEAU):
            raise ConfigError(f"{key}: there is no validation split to watch", "raise data.val_fraction")

    def require_shares(self, processes: int) -> None:
        """Raise ConfigError unless the configuration can be trained in a number of processes."""
        sharding.require_divisible(self.batch_size, processes)
        if processes > 1 and self.duration.seconds is not None:
            raise ConfigError("duration.seconds: several processes need a number of steps", "give steps or epochs")
