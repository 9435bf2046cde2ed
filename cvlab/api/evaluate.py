"""`cvlab eval`: evaluate the weights of a finished or interrupted run."""

from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.config import loading
from cvlab.config.metrics import require_finite
from cvlab.errors import ConfigError, RunDirError
from cvlab.experiments.base import Evaluable, EvaluatesOtherData
from cvlab.runs import checkpoint
from cvlab.runs.find import config_path
from cvlab.runs.records import read_json
from cvlab.runs.run_dir import RunDir


def evaluate(
    path: Path, splits: tuple[str, ...], weights: str, device: str | None, data: str | None = None
) -> dict[str, Any]:
    """Evaluate a run and write the result to its eval.json.

    Args:
        path: The run directory.
        splits: `train`, `val`, `test`; empty for validation and test, if present.
        weights: `last` or `best`.
        device: Where to evaluate; None for the device of the run's configuration.
        data: Another data set, by name or as `folder:PATH`; None for the run's own.

    Returns:
        `ok`, `run`, `experiment`, `checkpoint`, `step`, `data` and `metrics`.

    Raises:
        ConfigError: The experiment has no weights to evaluate.
        CheckpointError: There is no such checkpoint.
        DivergedError: A metric is not finite.
    """
    config = loading.load(str(config_path(path)), [f"device={device}"] if device else []).config
    experiment = registry.get_experiment(config.experiment)
    if not isinstance(experiment, Evaluable):
        raise ConfigError(f"{path.name}: a run of {config.experiment} has no weights to evaluate")
    if data is not None and not isinstance(experiment, EvaluatesOtherData):
        raise ConfigError(f"{path.name}: a run of {config.experiment} is evaluated on its own data only")
    state = checkpoint.load_of_run(path, weights)
    if data is not None and isinstance(experiment, EvaluatesOtherData):
        metrics = experiment.evaluate_on(config, path, state, data, splits)
    else:
        metrics = experiment.evaluate(config, path, state, splits)
    require_finite(metrics)
    result = {
        "ok": True,
        "run": str(path),
        "experiment": config.experiment,
        "checkpoint": weights,
        "step": state.get("step"),
        "data": data or read_json(path / "summary.json").get("data"),
        "metrics": metrics,
    }
    try:
        RunDir(path).write_json("eval.json", {key: value for key, value in result.items() if key != "ok"})
    except RunDirError as error:
        console.info(f"warning: the result could not be saved: {error.message}")
    return result
