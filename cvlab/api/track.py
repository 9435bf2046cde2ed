"""`cvlab track`: log a run to TensorBoard, MLflow or Weights & Biases.

A tracker reads the run directory, after the run or during it, and is never part of the training. All get the same: each
logged row as `NAME` at its step, the final metrics as `final/NAME`, the configuration by dotted key.
"""

import contextlib
import importlib
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from cvlab import registry
from cvlab.errors import ConfigError, install_command
from cvlab.reports import curves
from cvlab.runs.find import read_config
from cvlab.runs.records import Row, read_metrics, read_status, read_summary, require_folder

POLL_SECONDS = 1.0
MAX_VALUE_CHARS = 250  # of a configuration's value in MLflow, whose limit has changed between versions
FOLDER = "trackers"  # below a run directory
INVALID = re.compile(r"[^\w\-. :/]", re.ASCII)  # characters that MLflow refuses in names of metrics


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def close(self, status: str) -> str:
        """Finish with the run's status; return the command that shows the run."""


class TensorBoard:
    """Event files below the run directory."""

    package, extra = "tensorboard", "tensorboard"

    def __init__(self, path: Path, config: Row) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.folder = path / FOLDER / "tensorboard"
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()  # logged again, not twice
        self.writer = writer(str(self.folder))
        self.writer.add_text("configuration", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, status: str) -> str:  # noqa: ARG002 - event files have no status
        """Close the event file."""
        self.writer.close()
        return f"tensorboard --logdir {self.folder}"


class MLflow:
    """A run in an SQLite database beside the run directories; logging it again replaces it."""

    package, extra = "mlflow", "mlflow"

    def __init__(self, path: Path, config: Row) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.uri = f"sqlite:///{path.parent.absolute()}/mlflow.db"
        self.entities = importlib.import_module("mlflow.entities")
        self.client = importlib.import_module("mlflow").MlflowClient(tracking_uri=self.uri)
        name = str(config.get("experiment", "cvlab"))
        existing = self.client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self.client.create_experiment(name)
        for old in self.client.search_runs([experiment], f"attributes.run_name = '{path.name}'"):
            self.client.delete_run(old.info.run_id)
        self.run = self.client.create_run(experiment, run_name=path.name).info.run_id
        params = [
            self.entities.Param(INVALID.sub("_", key), str(value)[:MAX_VALUE_CHARS]) for key, value in config.items()
        ]
        self.client.log_batch(self.run, params=params)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""
        now = int(1000 * time.time())
        batch = [self.entities.Metric(INVALID.sub("_", name), value, now, step) for name, value in metrics.items()]
        self.client.log_batch(self.run, metrics=batch)

    def close(self, status: str) -> str:
        """Set the run's final status."""
        states = {"done": "FINISHED", "running": "RUNNING", "interrupted": "KILLED"}
        self.client.set_terminated(self.run, states.get(status, "FAILED"))
        return f"mlflow ui --backend-store-uri {self.uri}"


class Wandb:
    """A run of Weights & Biases, offline: nothing leaves the machine until `wandb sync`."""

    package, extra = "wandb", "wandb"

    def __init__(self, path: Path, config: Row) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        folder = path / FOLDER
        folder.mkdir(exist_ok=True)
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
        self.run = wandb.init(
            mode="offline", dir=str(folder), project="cvlab", name=path.name, config=config, settings=settings
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""
        self.run.log(dict(metrics), step=step)

    def close(self, status: str) -> str:
        """Finish the run."""
        folder = Path(self.run.dir).parent
        self.run.finish(exit_code=0 if status == "done" else 1)
        return f"wandb sync {folder}"


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": Wandb}


def log_run(path: Path, kind: str, follow: bool, sleep: Callable[[float], None] = time.sleep) -> str:
    """Log a run to a tracker.

    Args:
        path: The run directory.
        kind: `tensorboard`, `mlflow` or `wandb`.
        follow: Continue until the run ends.
        sleep: Waits for a number of seconds.

    Returns:
        The command that shows the run.

    Raises:
        ConfigError: If the tracker is unknown or not installed.
    """
    if kind not in TRACKERS:
        raise registry.unknown_name_error("tracker", kind, TRACKERS)
    tracker_type = TRACKERS[kind]
    if importlib.util.find_spec(tracker_type.package) is None:
        raise ConfigError(f"{kind} is not installed", install_command(tracker_type.extra))
    require_folder(require_folder(path / FOLDER) / "tensorboard")
    tracker: Tracker = tracker_type(path, read_config(path))
    last = 0
    try:
        for last, metrics in _rows(path, follow, sleep):
            tracker.log(metrics, last)
        final = _numbers(read_summary(path).get("metrics", {}))
        if final:
            tracker.log({f"final/{name}": value for name, value in final.items()}, last)
    except BaseException:
        with contextlib.suppress(Exception):
            tracker.close("failed")  # a run that is not closed is shown as running for ever
        raise
    return tracker.close(str(read_status(path).get("status")))


def _rows(path: Path, follow: bool, sleep: Callable[[float], None]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and numbers of each row, with the row's index for photos. With `follow` wait for more."""
    done = 0
    while True:
        is_running = follow and read_status(path).get("status") == "running"
        for number, row in enumerate(read_metrics(path)):
            if number < done:
                continue
            done = number + 1
            step = row.get("step", number)
            if isinstance(step, int) and (metrics := _numbers(row)):
                yield step, metrics
        if not is_running:
            return
        sleep(POLL_SECONDS)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in curves.NOT_CURVES
    }
