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

PER_LAYER = "layers"  # of log_gradients
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
    accumulate: PositiveInt = Field(
        1, description="split each batch into N parts and average their gradients: the same step in less memory"
    )
    duration: Duration = Field(description="exactly one of steps, epochs, seconds")
    clip_norm: PositiveFloat | None = Field(None, description="largest L2 norm of the gradient; null: no limit")
    sam: PositiveFloat | None = Field(
        None,
        description="radius of sharpness-aware minimization, for example 0.05: the gradient is that of the weights "
        "moved by it, at the cost of a second backward pass; null: none",
    )
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
    log_gradients: bool | Literal["layers"] = Field(
        False,
        description="log grad_norm, before clipping, and update_ratio, the L2 norm of a step / of the weights; layers: "
        "of each layer too",
    )

    trackers: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = Field(
        (), description="log the run to these while it is running, each in a process of its own; see `cvlab track`"
    )

    def digest(self) -> str:
        """Return the SHA-256 of the resolved configuration but for its trackers, on which no result depends."""
        return super(TrainConfig, self.model_copy(update={"trackers": ()})).digest()

    @model_validator(mode="after")
    def _check_trackers(self) -> "TrainConfig":
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError("trackers: names each tracker once")
        return self

    @model_validator(mode="after")
    def _check_accumulate(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide batch_size: {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _check_schedule_free(self) -> "TrainConfig":
        name = self.optimizer.name
        if name in optimizers.SCHEDULE_FREE and self.schedule.name != "constant":
            raise ValueError(f"schedule: {name} takes none, only warmup; set schedule: constant")
        if name in optimizers.SCHEDULE_FREE and self.ema is not None:
            raise ValueError(f"ema: {name} averages the weights itself; set ema: null")
        return self

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
        self.require_parts(self.batch_size, processes)

    def require_parts(self, batch_size: int, processes: int) -> None:
        """Raise ConfigError unless each process's share of a batch, smaller if there is less data, can be split."""
        if batch_size // processes % self.accumulate:
            raise ConfigError(
                f"accumulate {self.accumulate}: {batch_size // processes} images per process have no "
                f"{self.accumulate} equal parts",
                f"give a batch_size that is a multiple of {processes * self.accumulate}",
            )
