"""`cvlab track`: log a run to TensorBoard, MLflow, Weights & Biases or trackio.

A tracker reads the run directory, after the run or during it, and is never part of the training. All get the same: each
logged row as `NAME` at its step, the final metrics as `final/NAME`, the configuration by dotted key, and at the end the
plots, confusion matrices among them, the pictures, tags and the note.
"""

import contextlib
import importlib
import importlib.util
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cvlab import portability, registry
from cvlab.errors import ConfigError, CvlabError, install_command
from cvlab.reports import curves
from cvlab.runs import annotations
from cvlab.runs.find import read_config
from cvlab.runs.records import Row, is_number, read_metrics_from, read_status, read_summary, require_folder
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from PIL import Image

POLL_SECONDS = 1.0
MAX_PICTURES = 50  # of a run
PICTURE_FOLDERS, PICTURE_SUFFIXES = ("plots", "images"), (".png", ".jpg", ".jpeg", ".webp")
MAX_PARAMS, MAX_METRICS = 100, 1000  # of one request to MLflow
MAX_NAME_CHARS = 250  # of a metric in MLflow
MAX_VALUE_CHARS = 250  # of a configuration's value in MLflow, whose limit has changed between versions
FOLDER = "trackers"  # below a run directory
INVALID = re.compile(r"[^\w\-. :/]", re.ASCII)  # characters that MLflow refuses in names of metrics


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def log_image(self, name: str, image: "Image.Image", step: int) -> None:
        """Log a picture."""

    def annotate(self, tags: Sequence[str], note: str) -> None:
        """Log what the user has noted about the run."""

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

    def log_image(self, name: str, image: "Image.Image", step: int) -> None:
        """Log a picture."""
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def annotate(self, tags: Sequence[str], note: str) -> None:
        """Log tags and note as texts."""
        for name, text in (("tags", ", ".join(tags)), ("note", note)):
            if text:
                self.writer.add_text(name, text)

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
        artifacts = (path.parent.absolute() / "mlartifacts").as_uri()
        experiment = existing.experiment_id if existing else self.client.create_experiment(name, artifacts)
        for old in self.client.search_runs([experiment], f"attributes.run_name = '{path.name}'"):
            self.client.delete_run(old.info.run_id)
        self.run = self.client.create_run(experiment, run_name=path.name).info.run_id
        params = [
            self.entities.Param(INVALID.sub("_", key), str(value)[:MAX_VALUE_CHARS]) for key, value in config.items()
        ]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run, params=params[start : start + MAX_PARAMS])
        self.names: dict[str, str] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""
        now = int(1000 * time.time())
        batch = [self.entities.Metric(self._valid_name(name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(batch), MAX_METRICS):
            self.client.log_batch(self.run, metrics=batch[start : start + MAX_METRICS])

    def _valid_name(self, name: str) -> str:
        """Return a name that MLflow accepts, another one for each name."""
        if name not in self.names:
            valid = INVALID.sub("_", name)[:MAX_NAME_CHARS]
            if posixpath.normpath(valid) != valid or valid.startswith(("/", "..")):  # MLflow takes it for a path
                valid = valid.replace("/", "_").strip(".") or "_"
            number, unique = 1, valid
            while unique in self.names.values():
                number += 1
                unique = f"{valid[: MAX_NAME_CHARS - 10]}_{number}"
            self.names[name] = unique
        return self.names[name]

    def log_image(self, name: str, image: "Image.Image", step: int) -> None:  # noqa: ARG002 - an artifact has no step
        """Log a picture as an artifact."""
        self.client.log_image(self.run, image, f"{name}.png")

    def annotate(self, tags: Sequence[str], note: str) -> None:
        """Log each tag as a tag `true`, and the note as the description."""
        for tag in tags:
            self.client.set_tag(self.run, self._valid_name(tag), "true")
        if note:
            self.client.set_tag(self.run, "mlflow.note.content", note)

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

    def log_image(self, name: str, image: "Image.Image", step: int) -> None:
        """Log a picture."""
        wandb = importlib.import_module("wandb")
        self.run.log({name: wandb.Image(image)}, step=step)

    def annotate(self, tags: Sequence[str], note: str) -> None:
        """Set tags and notes of the run."""
        self.run.tags = tuple(tags)
        self.run.notes = note

    def close(self, status: str) -> str:
        """Finish the run."""
        folder = Path(self.run.dir).parent
        self.run.finish(exit_code=0 if status == "done" else 1)
        return f"wandb sync {folder}"


class Trackio:
    """A run in the folder `trackio` beside the run directories, on this machine; logging it again replaces it."""

    package, extra = "trackio", "trackio"

    def __init__(self, path: Path, config: Row) -> None:
        self.folder = path.parent.absolute() / "trackio"
        os.environ["TRACKIO_DIR"] = str(self.folder)
        for remote in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL"):
            os.environ.pop(remote, None)  # nothing leaves the machine
        self.trackio = importlib.import_module("trackio")
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        self.project = "cvlab"
        storage.delete_run(self.project, path.name)
        with contextlib.redirect_stdout(None):
            self.run = self.trackio.init(
                self.project, path.name, config=config, embed=False, auto_log_cpu=False, auto_log_gpu=False
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""
        self.run.log(dict(metrics), step=step)

    def log_image(self, name: str, image: "Image.Image", step: int) -> None:
        """Log a picture."""
        self.run.log({name: self.trackio.Image(image)}, step=step)

    def annotate(self, tags: Sequence[str], note: str) -> None:
        """Log tags and note as a table: a run of trackio has neither."""
        rows = [*(("tag", tag) for tag in tags), *([("note", note)] if note else [])]
        self.run.log({"annotations": self.trackio.Markdown("\n\n".join(f"{name}: {text}" for name, text in rows))})

    def close(self, status: str) -> str:  # noqa: ARG002 - a run of trackio has no status
        """Finish the run."""
        with contextlib.redirect_stdout(None):
            self.run.finish()
        return f"TRACKIO_DIR={self.folder} trackio show --project {self.project}"


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": Wandb, "trackio": Trackio}


def require_installed(kind: str) -> None:
    """Raise ConfigError if a tracker is unknown or not installed."""
    if kind not in TRACKERS:
        raise registry.unknown_name_error("tracker", kind, TRACKERS)
    tracker_type = TRACKERS[kind]
    if importlib.util.find_spec(tracker_type.package) is None:
        raise ConfigError(f"{kind} is not installed", install_command(tracker_type.extra))


def yield_cpu() -> None:
    """Lower the priority of this process, so that the run which it follows is not slowed."""
    portability.lower_priority()


def log_run(path: Path, kind: str, follow: bool, sleep: Callable[[float], None] = time.sleep) -> str:
    """Log a run to a tracker.

    Args:
        path: The run directory.
        kind: `tensorboard`, `mlflow`, `wandb` or `trackio`.
        follow: Continue until the run ends.
        sleep: Waits for a number of seconds.

    Returns:
        The command that shows the run.

    Raises:
        ConfigError: The tracker is unknown or not installed.
    """
    require_installed(kind)
    require_folder(require_folder(path / FOLDER) / "tensorboard")
    tracker: Tracker = TRACKERS[kind](path, read_config(path))
    last = 0
    steps: dict[str, int] = {}  # up to which a metric is logged: a run that is resumed writes some rows again
    try:
        for last, metrics in _rows(path, follow, sleep):
            new = {name: value for name, value in metrics.items() if last > steps.get(name, -1)}
            if new:
                tracker.log(new, last)
                steps |= dict.fromkeys(new, last)
        final = _numbers(read_summary(path).get("metrics", {}))
        if final:
            tracker.log({f"final/{name}": value for name, value in final.items()}, last)
        for name in _pictures(path):
            with contextlib.suppress(CvlabError):  # one that cannot be decoded
                tracker.log_image(name.rpartition(".")[0], _load_picture(path, name), last)
        notes = annotations.read(path)
        if notes.tags or notes.note:
            tracker.annotate(notes.tags, notes.note)
    except BaseException:
        with contextlib.suppress(Exception):
            tracker.close("failed")  # a run that is not closed is shown as running for ever
        raise
    return tracker.close(str(read_status(path).get("status")))


def _pictures(path: Path) -> list[str]:
    """Return the names of the first pictures of a run, plots before images."""
    files = [file for folder in PICTURE_FOLDERS for file in sorted((path / folder).glob("*")) if file.is_file()]
    return [f"{file.parent.name}/{file.name}" for file in files if file.suffix in PICTURE_SUFFIXES][:MAX_PICTURES]


def _load_picture(path: Path, name: str) -> "Image.Image":
    from cvlab.experiments.common import saved_images

    return saved_images.load(RunDir(path), name)


def _rows(path: Path, follow: bool, sleep: Callable[[float], None]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and numbers of each row, with the row's index for photos. With `follow` wait for more."""
    number = position = 0
    while True:
        is_running = follow and read_status(path).get("status") == "running"
        for row, end in read_metrics_from(path, position):
            position = end
            step = row.get("step", number)
            number += 1
            if isinstance(step, int) and (metrics := _numbers(row)):
                yield step, metrics
        if not is_running:
            return
        sleep(POLL_SECONDS)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if is_number(value) and name not in curves.NOT_CURVES}
