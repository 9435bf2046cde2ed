"""Runs and their results as Python objects; they read the run directory when they are asked."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from cvlab import registry
from cvlab.errors import ConfigError, CvlabError, DataError, ExpectationError
from cvlab.runs import trust
from cvlab.runs.find import config_path, runs_root
from cvlab.runs.records import read_json, read_metrics, read_status, read_summary
from cvlab.runs.results import Column, read_columns, read_errors

if TYPE_CHECKING:
    from os import PathLike

    import numpy as np
    from PIL import Image
    from torch import Tensor

    from cvlab.models.photo_module import PhotoModule

    ImageLike = str | PathLike[str] | Image.Image | Tensor | np.ndarray[Any, Any]

Row = dict[str, Any]


def to_table(rows: Sequence[Row]) -> Any:
    """Return rows as a pandas DataFrame if pandas is installed, else as they are."""
    if importlib.util.find_spec("pandas") is None:
        return list(rows)
    import pandas

    return pandas.DataFrame(list(rows))


class Result(Mapping[str, Any]):
    """What a run reports about one image: a mapping with the keys that `--json` prints.

    Attributes:
        run_path: The run directory.
        image: Path of the image.
        files: Paths of the files that the run has written about it, by name.
        error: Why the image could not be read; None if it could.
    """

    def __init__(self, run_path: Path, row: Row, columns: Sequence[Column]) -> None:
        self._row, self._columns = row, columns
        self.run_path = run_path
        self.image = run_path / row["image"]  # an absolute path stays as it is
        self.files = {column.name: run_path / row[column.name] for column in columns if self._has_file(column)}
        self.error: str | None = row.get("error")

    def _has_file(self, column: Column) -> bool:
        return column.is_file and isinstance(self._row.get(column.name), str)

    def __getitem__(self, key: str) -> Any:
        return self._row[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def __repr__(self) -> str:
        from cvlab.reports import embedded

        return f"<{self.image.name}: {embedded.describe(self._row, self._columns)}>"

    def _repr_html_(self) -> str:
        from cvlab.reports import inline

        return inline.results_html(self.run_path, [self._row], self._columns)

    def open(self, name: str | None = None) -> Image.Image:
        """Return a picture.

        Args:
            name: A key of `files`; None for the image itself if the run generated it, else for the first picture that
                the run drew of it, else for the photo.

        Raises:
            ConfigError: There is no such file.
            DataError, RunDirError: It cannot be read.
        """
        from cvlab.data import photos
        from cvlab.experiments.common import saved_images
        from cvlab.runs.run_dir import RunDir

        pictures = [key for key, path in self.files.items() if path.suffix == ".png"]
        is_output = not Path(self._row["image"]).is_absolute()
        if name is None and not is_output and not pictures:
            return photos.load(self.image)
        name = name or ("image" if is_output else pictures[0])
        if name not in self.files and not (name == "image" and is_output):
            raise registry.unknown_name_error("file", name, self.files)
        return saved_images.load(RunDir(self.run_path), self._row[name])


class Run:
    """A run directory.

    Two objects of the same directory are equal. Nothing is cached but the model of `predict`.

    Attributes:
        path: The run directory.
        name: Its name.
    """

    def __init__(self, path: str | PathLike[str], trust: bool = False) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._is_trusted = trust
        self._module = functools.lru_cache(maxsize=1)(self._load_module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.path.resolve() == other.path.resolve()

    def __hash__(self) -> int:
        return hash(self.path.resolve())

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status!r})"

    def _repr_html_(self) -> str:
        from cvlab.reports import inline

        return inline.run_html(self.path)

    @property
    def status(self) -> str:
        """`running`, `done`, `failed`, `interrupted` or `expectations_failed`; empty if it has not started."""
        return str(read_status(self.path).get("status", ""))

    @property
    def experiment(self) -> str:
        """The experiment, for example `classify`."""
        return str(self.config.get("experiment", ""))

    @property
    def config(self) -> Row:
        """The resolved configuration, nested as in its YAML file; lists are tuples."""
        from cvlab.config import strict_yaml

        value = strict_yaml.read(config_path(self.path)).value
        return value if isinstance(value, dict) else {}

    @property
    def summary(self) -> Row:
        """The content of summary.json: `metrics`, `expect`, `seconds` and others; empty if the run has not ended."""
        return read_summary(self.path)

    @property
    def environment(self) -> Row:
        """The content of env.json: versions, git commit, command line, device."""
        return read_json(self.path / "env.json")

    @property
    def rows(self) -> list[Row]:
        """The rows of metrics.jsonl; while the run is running, those it has logged so far."""
        return list(read_metrics(self.path))

    @property
    def metrics(self) -> Any:
        """The rows of metrics.jsonl as a pandas DataFrame if pandas is installed, else as a list of dictionaries."""
        return to_table(self.rows)

    @property
    def results(self) -> list[Result]:
        """What the run reports about each image; empty if its experiment is not about images."""
        summary = self.summary
        columns = read_columns(summary)
        return [Result(self.path, row, columns) for row in summary.get("results", [])]

    def raise_for_status(self) -> None:
        """Raise the error with which the command would have ended.

        Raises:
            DataError: A photo could not be read.
            ExpectationError: An expectation failed, or an attack changed the prediction for no photo.
            CvlabError: The run has failed or was interrupted.
        """
        from cvlab.api import photos, run

        result = run.result(self.path)
        unread = read_errors(result.get("results", []))
        failed = [verdict["rule"] for verdict in result["expect"] if not verdict["met"]]
        failure = f"not met: {'; '.join(failed)}" if failed else ""
        if not failure and self.experiment == "attack" and result["status"] == "done":
            failure = photos.attack_failure(result)
        if "reason" in result:
            raise CvlabError(f"{self.name}: {result['reason']}", result["hint"])
        if unread:
            raise DataError(f"{len(unread)} of {len(result['results'])} photos could not be read: {unread[0]}")
        if failure:
            raise ExpectationError(failure, f"see {self.path}")

    def model(self, checkpoint: str = "last", device: str = "cpu") -> PhotoModule:
        """Return the trained model with its preprocessing inside, frozen and in evaluation mode.

        Its `forward` takes images (N, 3, H, W) of any size, float32 in [0, 1] or uint8. A classifier returns logits
        (N, num_classes), a detector a dictionary with `boxes`, `scores` and `labels` for each image, a captioner texts.

        Args:
            checkpoint: `last` or `best` weights.
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

        Raises:
            ConfigError: The experiment has no model for images.
            CheckpointError: There is no such checkpoint.
        """
        from cvlab.api.session import library_call

        with library_call(progress=False):
            return self._load_module(checkpoint, device)

    def predict(
        self, images: ImageLike | Sequence[ImageLike], checkpoint: str = "last", device: str = "auto"
    ) -> list[Row]:
        """Return predictions for images, a dictionary for each, with the keys of `Run.results`; writes no files.

        Args:
            images: One or several photos: paths, folders or patterns; PIL images; arrays (H, W), (H, W, 3) or
                (N, H, W, 3) of numpy; tensors (3, H, W) or (N, 3, H, W). Numbers are in [0, 1], or integers of 8 bits.
            checkpoint: `last` or `best` weights.
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

        Raises:
            DataError: A photo cannot be read.
            ConfigError: The experiment has no model for images, or `images` is something else.
        """
        from cvlab.api import image_inputs
        from cvlab.api.session import library_call

        with library_call(progress=False):
            photos = image_inputs.to_images(images)
            return self._module(checkpoint, device).predict(photos) if photos else []

    def _load_module(self, checkpoint: str, device: str) -> PhotoModule:
        from cvlab.config import loading
        from cvlab.engine.device import select_device
        from cvlab.experiments.base import HasPhotoModule

        trust.require_trust(self.path, self._is_trusted)
        config = loading.load(str(config_path(self.path))).config
        experiment = registry.get_experiment(config.experiment)
        if not isinstance(experiment, HasPhotoModule):
            raise ConfigError(f"{self.name}: a run of {config.experiment} has no model for images")
        return experiment.photo_module(config, self.path, checkpoint, str(select_device(device).device))

    def resume(
        self,
        overrides: Mapping[str, Any] | Iterable[str] | None = None,
        *,
        runs_dir: str | PathLike[str] | None = None,
        allow_changes: bool = False,
        progress: bool = False,
    ) -> Run:
        """Resume an interrupted or failed run from its newest checkpoint, and return it.

        With `overrides` return a new run that continues this one from its last checkpoint, `{"duration.epochs": 20}`
        for example, whether it has ended or not. This one does not change.

        Args:
            overrides: New values by dotted key, or texts `key=value`.
            runs_dir: Folder of the new run; None for $CVLAB_RUNS or ./runs.
            allow_changes: Continue although the data or your own code was changed.
            progress: Show messages and a progress bar.

        Raises:
            ConfigError: One of the overrides is for a run that begins anew only, such as the model's.
            CvlabError: The run cannot be resumed, or fails or is interrupted again.
        """
        from cvlab.api import extend, run
        from cvlab.api.session import library_call
        from cvlab.config.overrides import to_texts

        trust.require_trust(self.path, self._is_trusted or allow_changes)
        texts = to_texts(overrides)
        with library_call(progress):
            path = self.path
            if texts:
                root = runs_root(None if runs_dir is None else fspath(runs_dir))
                path = extend.create(extend.prepare(path, texts), root)
            run.resume(path, allow_changes=allow_changes)
        return Run(path, self._is_trusted) if texts else self

    def evaluate(
        self,
        splits: str | Sequence[str] = (),
        *,
        checkpoint: str = "last",
        data: str | None = None,
        device: str | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        """Evaluate the run's weights; return the metrics, each name preceded by its split.

        Args:
            splits: `train`, `val`, `test`; empty for validation and test, if present.
            checkpoint: `last` or `best` weights.
            data: Another data set, by name or as `folder:PATH`; classifiers only.
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; None for that of the run's configuration.
            progress: Show messages and a progress bar.

        Raises:
            ConfigError: The experiment has no weights to evaluate.
            CheckpointError: There is no such checkpoint.
        """
        from cvlab.api import evaluate
        from cvlab.api.session import library_call

        trust.require_trust(self.path, self._is_trusted)
        names = (splits,) if isinstance(splits, str) else tuple(splits)
        with library_call(progress):
            metrics: dict[str, float] = evaluate.evaluate(self.path, names, checkpoint, device, data)["metrics"]
            return metrics

    def export(self, to: str, file: str | PathLike[str] | None = None, *, checkpoint: str = "last") -> Path:
        """Write the model as `safetensors` or `onnx`, compare the file with the model, and return its path.

        Args:
            to: The format.
            file: The file to write; None for `export.FORMAT` of the run.
            checkpoint: `last` or `best` weights.

        Raises:
            ConfigError: The experiment has no model to export, or a package is missing.
            CheckpointError: There is no such checkpoint, or the file differs from the model.
        """
        from cvlab.api import export
        from cvlab.api.session import library_call

        trust.require_trust(self.path, self._is_trusted)
        with library_call(progress=False):
            return Path(export.export(self.path, to, checkpoint, Path(file) if file is not None else None)["files"][0])

    def report(self, file: str | PathLike[str] | None = None) -> Path:
        """Write the HTML report and return its path: `file`, or `report.html` of the run."""
        from cvlab.reports import html
        from cvlab.storage import atomic

        if file is None:
            html.write_run(self.path)
            return self.path / html.FILE
        atomic.write_text(Path(file), html.run_page(self.path))
        return Path(file)


class RunList(Sequence[Run]):
    """Runs, oldest first unless they were sorted.

    Attributes:
        rows: What `cvlab runs --json` lists about each.
    """

    def __init__(self, root: Path, rows: Sequence[Row], trust: bool = False, is_sorted: bool = False) -> None:
        self._root, self._is_trusted, self._is_sorted = root, trust, is_sorted
        self.rows = list(rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> RunList: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Run | RunList:
        if isinstance(index, slice):
            return RunList(self._root, self.rows[index], self._is_trusted, self._is_sorted)
        return Run(self._root / self.rows[index]["run"], self._is_trusted)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<{len(self)} runs in {self._root}>"

    @property
    def table(self) -> Any:
        """The runs with their metrics and the key that they are sorted by.

        A pandas DataFrame if pandas is installed, else a list of dictionaries.
        """
        columns = ("run", "status", "experiment", "data", "seconds")
        rows = [{key: row.get(key) for key in columns} | row["metrics"] | row["values"] for row in self.rows]
        return to_table(rows)

    def _repr_html_(self) -> str:
        from cvlab.reports import inline

        return inline.runs_html(self.rows if self._is_sorted else self.rows[::-1])
