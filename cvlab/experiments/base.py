"""The interface of experiments: what `experiment: NAME` in a configuration asks for, and what some can do besides.

May import `config`, `data`, `runs` and below; the types of `engine` only for annotations. A task's module defines a
configuration and a subclass of `Experiment`; `cvlab.registry.EXPERIMENTS` names it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from cvlab import registry
from cvlab.config import validation
from cvlab.config.expectations import GroupedResult
from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric
from cvlab.config.schema import ExperimentConfig
from cvlab.config.validation import Problems
from cvlab.data.resolve import DownloadPolicy, resolve_dataset
from cvlab.errors import CvlabError
from cvlab.runs import user_code
from cvlab.runs.records import read_status
from cvlab.runs.results import Column
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from cvlab.engine.device import ComputeContext
    from cvlab.engine.task import ExportSpec, TrainTask
    from cvlab.experiments.common.data_overview import DataOverview
    from cvlab.experiments.common.labeled_classifier import LabeledClassifier, LabeledImages
    from cvlab.models.photo_module import PhotoModule
    from cvlab.models.pretrained import PretrainedClassifier
    from cvlab.models.summary import SummarySpec

C = TypeVar("C", bound=ExperimentConfig)
Model = TypeVar("Model")
State = dict[str, Any]
Metrics = dict[str, float]


class Experiment(Generic[C]):
    """One kind of job that `experiment: NAME` asks for.

    A subclass sets `name`, `Config` and `metrics`, and implements `plan` and `run`. The first line of its docstring is
    what `cvlab experiments` prints.
    """

    name: ClassVar[str]
    Config: type[C]
    metrics: ClassVar[tuple[Metric, ...]] = ()
    saves_checkpoints: ClassVar[bool] = True
    nested_configs: ClassVar[tuple[str, ...]] = ()  # keys that hold a configuration, which may say `from:`
    dotted_blocks: ClassVar[tuple[tuple[str, ...], ...]] = ()  # paths of blocks whose own keys are dotted

    def expand(self, raw: dict[str, Any], overrides: Sequence[str], location: Callable[[str], str]) -> Sequence[str]:
        """Change a raw configuration in place before the overrides are applied.

        Args:
            raw: The configuration as it was read.
            overrides: The `key=value` texts of the command line.
            location: Returns the file and line of a top-level key, for error messages.

        Returns:
            Overrides between which the experiment chooses when it starts, each of which makes a valid configuration.
        """
        return ()

    def reported_metrics(self, config: C) -> tuple[Metric, ...]:
        """Return the metrics that a run of `config` reports."""
        return tuple(metric for metric in self.metrics if metric.when is None or metric.when(config))

    def problems(self, config: C, base: Path) -> Problems:
        """Return what is wrong with a configuration that its schema cannot see; user files are relative to `base`."""
        return validation.unknown_metrics(config, self.reported_metrics(config))

    def prepare(self, loaded: Loaded, policy: DownloadPolicy) -> C:
        """Return the configuration to run, with its data set downloaded or replaced by its fallback.

        Raises:
            DataError: if neither the data set nor its fallback can be used.
        """
        config: C = loaded.config  # type: ignore[assignment]
        data = config.data_config()
        if data is None:
            return config
        resolved = resolve_dataset(data, policy)
        return config if resolved is data else config.with_data(resolved)

    def write_inputs(self, config: C, base: Path, run: RunDir) -> C:
        """Copy what the configuration refers to into a new run directory; return the configuration that names it."""
        return user_code.copy_user_code(config, base, run.path)

    def plan(self, config: C, base: Path) -> dict[str, Any]:
        """Return what a run would do, by name; nothing is written. Raise a CvlabError if it could not start."""
        raise NotImplementedError

    def run(self, config: C, run: RunDir) -> Metrics:
        """Run in a run directory, from its latest checkpoint if it has one, and return the metrics."""
        raise NotImplementedError

    def grouped_results(self, config: C, run: RunDir) -> Sequence[GroupedResult]:
        """Return the results that expectations with functions such as `mean(...)` are evaluated on."""
        return ()


class PhotoExperiment(Experiment[C]):
    """An experiment on images, which reports one `PhotoResult` for each of them.

    A subclass also sets `columns`: how tables and pages show its results.
    """

    columns: ClassVar[tuple[Column, ...]]
    _loaded: tuple[C, Any] | None = None

    def load_once(self, config: C, load: Callable[[C], Model]) -> Model:
        """Return `load(config)`, which `plan` and the `run` after it share; loaded again for another configuration."""
        if self._loaded is None or self._loaded[0] != config:
            self._loaded = config, load(config)
        model: Model = self._loaded[1]
        return model


class Evaluable(Generic[C]):
    """An experiment whose weights can be evaluated again: `cvlab eval`."""

    def evaluate(self, config: C, base: Path, state: State, splits: Sequence[str]) -> Metrics:
        """Evaluate the weights of a checkpoint.

        Args:
            config: The run's configuration.
            base: The run directory, which the paths of `config` are relative to.
            state: The checkpoint.
            splits: `train`, `val`, `test`; empty for validation and test, if present.

        Returns:
            The metrics, each name preceded by its split.
        """
        raise NotImplementedError


class EvaluatesOtherData(Generic[C]):
    """An experiment whose weights can be evaluated on another data set: `cvlab eval RUN --data NAME`."""

    def evaluate_on(self, config: C, base: Path, state: State, data: str, splits: Sequence[str]) -> Metrics:
        """Evaluate the weights of a checkpoint on a data set.

        Args:
            config: The run's configuration.
            base: The run directory.
            state: The checkpoint.
            data: Name of a data set, or `folder:PATH`.
            splits: Its splits; empty for all that are not for training.

        Returns:
            The metrics, each name preceded by its split.
        """
        raise NotImplementedError


def has_capability(capability: type) -> Callable[[Path], bool]:
    """Return a function that tells whether a run is of an experiment with a capability and has a checkpoint."""

    def fits(path: Path) -> bool:
        try:
            experiment = read_status(path).get("experiment")
            is_capable = experiment is not None and isinstance(registry.get_experiment(experiment), capability)
        except CvlabError:  # a damaged status, or an experiment of another version
            return False
        return is_capable and any((path / "checkpoints").glob("*.pt"))

    return fits


def default_splits(splits: Mapping[str, Any]) -> list[str]:
    """Return which of `val` and `test` a data set has: those that are evaluated if none is named."""
    return [name for name in ("val", "test") if splits.get(name)]


class ClassifiesPhotos(Generic[C]):
    """An experiment whose model can be asked about photos: `--model RUN`."""

    def photo_classifier(self, config: C, base: Path, state: State, device: str) -> "PretrainedClassifier":
        """Return the model of a checkpoint, in evaluation mode, and how it takes photos."""
        raise NotImplementedError


class MeasuresRobustness(Generic[C]):
    """An experiment whose classifier can be attacked on its own data: `cvlab attack RUN --on test`."""

    def labeled_classifier(
        self, config: C, base: Path, state: State, split: str, device: str, check_interrupt: Callable[[], None]
    ) -> "LabeledClassifier":
        """Return the classifier of a checkpoint with a split of its data. ConfigError if there is no such split."""
        raise NotImplementedError


class HasLabeledImages(Generic[C]):
    """An experiment whose data are images with one label each: `cvlab look RUN`."""

    def labeled_images(
        self, config: C, base: Path, split: str | None, check_interrupt: Callable[[], None]
    ) -> "LabeledImages":
        """Return the images of a split, None for `val`, or `train` if there is none. ConfigError without the split."""
        raise NotImplementedError


class DetectsObjects:
    """An experiment with bundled detectors, which other tasks ask about photos."""

    def bundled_detector(self, name: str, ctx: "ComputeContext", score_threshold: float) -> "PhotoModule":
        """Return a bundled detector, whose `predict` returns the `objects` of each photo.

        Args:
            name: Name of its weights, for example `everyday`.
            ctx: Where to run it.
            score_threshold: Objects of lower scores are left out.
        """
        raise NotImplementedError


class ShowsData(Experiment[C]):
    """An experiment whose data set can be looked at: `cvlab data show`."""

    def data_overview(self, config: C, base: Path, num_samples: int) -> "DataOverview":
        """Return what the data set consists of, with some training images before and after augmentation."""
        raise NotImplementedError


class Exportable(Generic[C]):
    """An experiment whose model can be exported: `cvlab export`."""

    def export_spec(self, config: C, base: Path, state: State) -> "ExportSpec":
        """Return the model of a checkpoint and what it takes and returns."""
        raise NotImplementedError


class HasPhotoModule(Generic[C]):
    """An experiment whose model takes images in memory: `Run.model()` and `Run.predict()` in Python."""

    def photo_module(self, config: C, base: Path, weights: str, device: str) -> "PhotoModule":
        """Return the model of a run, in evaluation mode.

        Args:
            config: The run's configuration.
            base: The run directory.
            weights: `last` or `best`.
            device: Where to put it.

        Raises:
            ConfigError: if the run has no such weights.
            CheckpointError, DataError: if they are missing or damaged.
        """
        raise NotImplementedError


class HasSummary(Generic[C]):
    """An experiment whose model can be summarized layer by layer: `cvlab summary`."""

    def summary_spec(self, config: C, base: Path) -> "SummarySpec":
        """Return the untrained model of a configuration and an input of one image; no image of the data set is read.

        Raises:
            DataError: if the model depends on data or weights that are not on the disk.
        """
        raise NotImplementedError


class HasTrainTask(Generic[C]):
    """An experiment whose training steps can be taken one by one: `cvlab lr`, `cvlab bench`."""

    def train_task(self, config: C, base: Path, check_interrupt: Callable[[], None]) -> "TrainTask":
        """Return the untrained model, its loss and its batches; the evaluation of the task returns nothing.

        Args:
            config: The configuration, whose data set is on the disk.
            base: The folder that paths to user files are relative to.
            check_interrupt: Called often while data is read; may raise to stop.
        """
        raise NotImplementedError

    def synthetic_task(self, config: C, base: Path) -> "TrainTask":
        """Return what `train_task` does, on a generated batch of the data set's shape: no data set is read."""
        raise NotImplementedError
