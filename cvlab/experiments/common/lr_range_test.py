"""The learning-rate range test of any configuration that trains: `cvlab lr`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import Field, model_validator

from cvlab import console, registry
from cvlab.config import loading, overrides, validation
from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric
from cvlab.config.schema import NestedConfig
from cvlab.config.validation import Problems
from cvlab.engine.config import TrainConfig
from cvlab.errors import ConfigError
from cvlab.experiments.base import Experiment, HasTrainTask
from cvlab.runs import user_code
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from cvlab.engine.lr_range_test import RangeTest

PLOT = "plots/lr_range_test.png"
SUGGESTED = "minimum_tenth"  # of the suggestions, the one to paste
Rate = Annotated[float, Gt(0), Le(100)]


class LrRangeTestConfig(NestedConfig):
    """A base configuration that trains, and the learning rates to try."""

    min: Rate = Field(1e-6, description="learning rate of the first step")
    max: Rate = Field(10.0, description="learning rate of the last step, unless the loss diverges before")
    steps: Annotated[int, Ge(20), Le(10_000)] = Field(100, description="number of steps")

    @model_validator(mode="after")
    def _increases(self) -> "LrRangeTestConfig":
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        return self

    @property
    def threads(self) -> int | None:
        """The number of CPU threads of the base."""
        threads: int | None = self.base.get("threads")
        return threads


class LrRangeTestExperiment(Experiment[LrRangeTestConfig]):
    """Find a learning rate: train a new model for some steps while the rate rises exponentially.

    References:
        Smith, 2017, "Cyclical learning rates for training neural networks", section 3.3.

    Differences from the paper:
        The rate rises exponentially, and the suggestions come from the smoothed loss, not from the accuracy.

    Metrics:
        `minimum_tenth_lr` (a tenth of the rate at the minimum of the smoothed loss), `steepest_lr` (where it falls
        fastest) and `valley_lr` (in the middle of the longest descent), if the loss falls; `steps` until it diverges.

    Command:
        cvlab lr cifar_bn
    """

    name = "lr_range_test"
    Config = LrRangeTestConfig
    saves_checkpoints = False
    nested_configs = ("base",)
    metrics = (
        Metric("minimum_tenth_lr"),
        Metric("steepest_lr"),
        Metric("valley_lr"),
        Metric("smallest_loss", better="lower"),
        Metric("diverged"),
        Metric("steps"),
    )

    def problems(self, config: LrRangeTestConfig, base: Path) -> Problems:
        """Return what is wrong with the base and with the expectations."""
        misplaced = [key for key in overrides.NOT_INHERITED if key in config.base]
        if misplaced:
            return [(("base", misplaced[0]), f"base.{misplaced[0]}: put it beside `base`")]
        trained, problems = validation.check(dict(config.base), base)
        if trained is None:
            return [(("base", *path), message) for path, message in problems]
        try:
            _require_training(trained.experiment, trained)
        except ConfigError as error:
            return [(("base", "experiment"), str(error))]
        return super().problems(config, base)

    def write_inputs(self, config: LrRangeTestConfig, base: Path, run: RunDir) -> LrRangeTestConfig:
        """Copy the user's files that the base names into the run directory."""
        user_code.snapshot_user_code(config.base, base, run.path)
        return user_code.rewrite_paths(config)

    def plan(self, config: LrRangeTestConfig, base: Path) -> dict[str, Any]:
        """Return what the test would do."""
        trained = _base_config(config, base)
        plan = registry.get_experiment(trained.experiment).plan(trained, base)
        rates = f"{config.min:g} to {config.max:g} in {config.steps} steps"
        return {**plan, "trains": trained.experiment, "steps": config.steps, "rates": rates}

    def run(self, config: LrRangeTestConfig, run: RunDir) -> dict[str, float]:
        """Take the steps, draw the curve, and suggest learning rates."""
        from cvlab.engine import lr_range_test
        from cvlab.reports import plots

        trained = _base_config(config, run.path)
        experiment = registry.get_experiment(trained.experiment)
        assert isinstance(experiment, HasTrainTask)
        keys = lr_range_test.rate_keys(trained)
        rates = lr_range_test.exponential_rates(config.min, config.max, config.steps)
        run.truncate_metrics(0)  # of a test that was interrupted, which begins again
        with StopRequest() as stop:
            task = experiment.train_task(trained, run.path, lambda: stop.raise_if_set(0, run.path.name))
            with console.Progress(config.name, config.steps, 0) as bar:

                def on_step(step: int, rate: float, loss: float) -> None:
                    run.append({"step": step + 1, "lr": rate, "loss": loss})
                    stop.raise_if_set(step + 1, run.path.name)
                    if bar.due():
                        bar.update(step + 1, f"lr {rate:.2g}, loss {loss:.3g}")

                test = lr_range_test.run(trained, task, rates, on_step)
        suggestions = {k: v for k, v in dataclasses.asdict(lr_range_test.suggest(test)).items() if v is not None}
        title = f"learning-rate range test: {run.path.name}"
        marks = {name.replace("_", " "): rate for name, rate in suggestions.items()}
        run.folder("plots")
        curves = {"loss": test.losses, "smoothed": test.smoothed}
        run.write_bytes(PLOT, plots.draw_lr_range_test(test.rates, curves, marks, title))
        run.extra_summary["headline"] = _headline(config, test, suggestions, keys, trained)
        return {
            **{f"{name}_lr": rate for name, rate in suggestions.items()},
            "smallest_loss": min(test.smoothed),
            "diverged": float(test.has_diverged),
            "steps": len(test.losses),
        }


def _headline(
    config: LrRangeTestConfig,
    test: "RangeTest",
    suggestions: Mapping[str, float],
    keys: Sequence[str],
    trained: TrainConfig,
) -> str:
    """Return the line to paste, or why there is none."""
    if SUGGESTED not in suggestions:
        hint = "a smaller --min" if test.has_diverged else "other --min and --max, or more --steps"
        return (
            f"no suggestion: the loss did not fall between lr {test.rates[0]:.2g} and {test.rates[-1]:.2g}; try {hint}"
        )
    arguments = trained.optimizer.builder_arguments()
    factor = suggestions[SUGGESTED] / arguments["lr"]
    return " ".join(f"optimizer.{key}={factor * arguments[key]:.2g}" for key in keys)


def _require_training(experiment: str, config: object) -> None:
    """Raise ConfigError unless a configuration is of an experiment that trains with a learning rate."""
    from cvlab.engine import lr_range_test

    if not isinstance(registry.get_experiment(experiment), HasTrainTask) or not isinstance(config, TrainConfig):
        raise ConfigError(f"{experiment} has no learning rate to find", "give a configuration that trains")
    lr_range_test.rate_keys(config)


def _base_config(config: LrRangeTestConfig, base: Path) -> TrainConfig:
    """Return the configuration to find a learning rate for."""
    trained, problems = validation.check(dict(config.base), base)
    if trained is None:
        raise ConfigError(problems[0][1])
    assert isinstance(trained, TrainConfig)
    return trained


def load_range_test(reference: str, texts: Sequence[str], **values: float | int | None) -> Loaded:
    """Load a configuration that trains, and return that of its range test.

    Args:
        reference: A configuration, by name or as a file, or a run directory.
        texts: Overrides of its keys.
        values: `min`, `max`, `steps`; None for the default.

    Raises:
        ConfigError: The configuration is invalid, has no learning rate, or comes in several variants.
    """
    loaded = loading.load(reference, texts)
    config = loaded.config
    loaded.require_one_variant()
    _require_training(config.experiment, config)
    values = {key: value for key, value in values.items() if value is not None}
    raw = {
        "experiment": LrRangeTestExperiment.name,
        "name": f"{config.name[:57]}-lr",
        "base": {k: v for k, v in config.model_dump().items() if k not in overrides.NOT_INHERITED},
        **values,
    }
    range_test, problems = validation.check(raw, loaded.base)
    if range_test is None:
        raise ConfigError(problems[0][1], further_errors=tuple(ConfigError(text) for _, text in problems[1:]))
    return Loaded(range_test, loaded.base, loaded.source)
