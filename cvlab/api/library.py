"""cvlab from Python: what the commands do, as functions that return runs; `library_photos` has those on photos.

They write the same run directories and raise the same errors as the commands, print warnings only unless `progress` is
set, and leave the caller's random numbers and threads as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.api.handles import Run, RunList
from cvlab.errors import ConfigError
from cvlab.runs.find import find_run, runs_root

if TYPE_CHECKING:
    from cvlab.config.loading import Loaded
    from cvlab.data.resolve import DownloadPolicy

StrPath = str | PathLike[str]
Overrides = Mapping[str, Any] | Iterable[str] | None


def train(
    config: StrPath | Mapping[str, Any],
    overrides: Overrides = None,
    *,
    seed: int | None = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    download: bool = False,
    offline: bool = False,
    fallback: bool = True,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Run a configuration of any experiment, as `cvlab train` does.

    A run whose expectations fail is returned as well, with the status `expectations_failed`; `Run.raise_for_status`
    raises ExpectationError then. An interrupt (Ctrl-C, or a notebook's stop button) ends the run with a checkpoint and
    raises StoppedError; `cvlab.load_run("latest").resume()` continues it.

    Args:
        config: Name of a shipped configuration, a YAML file, a run, or a dictionary with the content of such a file.
        overrides: Values by dotted key, `{"optimizer.lr": 1e-2}`, or texts `key=value`.
        seed: Seed of initialization, data order and augmentation.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        runs_dir: Folder of the runs; None for $CVLAB_RUNS or ./runs.
        download: Wait for the download of a data set that is not on the disk, no matter how long it takes.
        offline: Do not access the network.
        fallback: Use the fallback data set, with a warning, if the data set cannot be had quickly.
        trust: Run the Python files of a run directory that was not made on this machine.
        progress: Show messages and a progress bar.

    Raises:
        ConfigError: The configuration is invalid; `further_errors` are the other problems of it.
        DataError: The data set is missing.
        CvlabError: The run fails or is interrupted; `run` is its directory.
    """
    loaded = _load(config, overrides, {"seed": seed, "device": device}, trust)
    return _start(loaded, _policy(download, offline, fallback), runs_dir, progress)


def lr(
    config: StrPath,
    overrides: Overrides = None,
    *,
    min: float | None = None,
    max: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    download: bool = False,
    offline: bool = False,
    fallback: bool = True,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Suggest a learning rate by a range test, as `cvlab lr` does: `run.summary["metrics"]["minimum_tenth_lr"]`.

    Args:
        config: A configuration that trains: a name, a YAML file or a run.
        overrides: See `train`.
        min: Learning rate of the first step; None for 1e-6.
        max: Learning rate of the last step; None for 10.
        steps: Number of steps; None for 100.
        seed: See `train`.
        device: See `train`.
        runs_dir: See `train`.
        download: See `train`.
        offline: See `train`.
        fallback: See `train`.
        trust: See `train`.
        progress: Show messages and a progress bar.

    Raises:
        ConfigError: The configuration is invalid, or has no learning rate.
        CvlabError: As `train`.
    """
    from cvlab.config.overrides import to_texts
    from cvlab.experiments.common.lr_range_test import load_range_test
    from cvlab.runs.trust import require_trust_of

    require_trust_of(fspath(config), trust)
    texts = [*to_texts(overrides), *not_none({"seed": seed, "device": device})]
    loaded = load_range_test(fspath(config), texts, min=min, max=max, steps=steps)
    return _start(loaded, _policy(download, offline, fallback), runs_dir, progress)


def robustness(
    runs: StrPath | Sequence[StrPath],
    *,
    on: str = "test",
    methods: Sequence[str] | None = None,
    eps: Sequence[float] | None = None,
    corruptions: Sequence[str] | None = None,
    overrides: Overrides = None,
    seed: int | None = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Measure the accuracy of trained classifiers under attack and under corruptions, as `cvlab attack RUN --on` does.

    Args:
        runs: One or several training runs: paths, or names below `runs_dir`.
        on: `train`, `val` or `test`.
        methods: Any of `fgsm`, `pgd`, `apgd_ce`, `apgd_dlr`, `square`; None for `fgsm` and `pgd`.
        eps: Largest changes of a pixel, in 1/255; None for 0, 1, 2, 4 and 8.
        corruptions: Any of `noise`, `blur`, `contrast`, `jpeg`, or `all` alone; None for none.
        overrides: Further keys, such as `num_images`; see `train`.
        seed: See `train`.
        device: See `train`.
        runs_dir: See `train`.
        trust: See `train`.
        progress: Show messages and a progress bar.

    Raises:
        ConfigError: A run is no classifier, or a value is invalid.
        CvlabError: As `train`.
    """
    from cvlab.api import photos
    from cvlab.config.overrides import to_texts
    from cvlab.data.resolve import DownloadPolicy

    values = {"on": on, "methods": methods, "eps": eps, "corruptions": corruptions, "seed": seed, "device": device}
    names = [runs] if isinstance(runs, (str, PathLike)) else list(runs)
    root = root_of(runs_dir)
    loaded = photos.load_robustness([fspath(name) for name in names], values, to_texts(overrides), root, trust)
    return _start(loaded, DownloadPolicy(True, False, False), runs_dir, progress)


def sweep(
    config: StrPath,
    overrides: Overrides = None,
    *,
    workers: int | None = None,
    fresh: bool = False,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    download: bool = False,
    offline: bool = False,
    fallback: bool = True,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Run a grid or search over configurations, as `cvlab sweep` does: an interrupted one is resumed.

    Args:
        config: A sweep, or any other configuration, which becomes its base.
        overrides: Axes and other keys: `{"grid.optimizer.lr": [1e-3, 1e-2], "seeds": [0, 1], "base.reg": 0}`.
        workers: Number of trials at a time.
        fresh: Start anew even if the same sweep was interrupted.
        device: Device of the trials.
        runs_dir: See `train`.
        download: See `train`.
        offline: See `train`.
        fallback: See `train`.
        trust: See `train`.
        progress: Show messages and a progress bar.

    Raises:
        CvlabError: As `train`.
    """
    from cvlab.api import sweep as api_sweep
    from cvlab.api.session import library_call
    from cvlab.config.overrides import to_texts
    from cvlab.runs.trust import require_trust_of
    from cvlab.sweeps.experiment import load_sweep

    require_trust_of(fspath(config), trust)
    loaded = load_sweep(fspath(config), [*to_texts(overrides), *not_none({"base.device": device, "workers": workers})])
    with library_call(progress):
        result = api_sweep.start(loaded, _policy(download, offline, fallback), root_of(runs_dir), fresh)
    return Run(result["run"])


def summary(
    config: StrPath | Mapping[str, Any],
    overrides: Overrides = None,
    *,
    runs_dir: StrPath | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Return the layers of a configuration's model, as `cvlab summary --json` does; nothing is written.

    Args:
        config: See `train`; a run may also be given as `latest` or by a part of its name.
        overrides: See `train`.
        runs_dir: Folder of the runs; None for $CVLAB_RUNS or ./runs.
        trust: See `train`.

    Returns:
        `layers`, each with `name`, `layer`, `output_shape`, `parameters`, `flops`, `activation_bytes` and
        `receptive_field`, and the totals.

    Raises:
        ConfigError: The configuration is invalid, or its experiment has no model.
        DataError: The model depends on data or weights that are not on the disk.
    """
    from cvlab.api import summary as api_summary
    from cvlab.api.session import library_call

    if isinstance(config, (str, PathLike)):
        config = api_summary.source_of(fspath(config), root_of(runs_dir))
    loaded = _load(config, overrides, {}, trust)
    with library_call(progress=False):
        return api_summary.summarize(loaded)


def load_run(reference: StrPath = "latest", *, runs_dir: StrPath | None = None, trust: bool = False) -> Run:
    """Return a run of the disk.

    Args:
        reference: A run directory, `latest`, or part of a run's name.
        runs_dir: Folder of the runs; None for $CVLAB_RUNS or ./runs.
        trust: Run its Python files although they were not made on this machine.

    Raises:
        RunDirError: There is no such run, or several match.
    """
    return Run(find_run(fspath(reference), root_of(runs_dir)), trust)


def runs(
    query: str = "",
    *,
    sort: str | None = None,
    reverse: bool = False,
    limit: int | None = None,
    runs_dir: StrPath | None = None,
) -> RunList:
    """Return the runs on the disk, oldest first, as `cvlab runs` lists them.

    Args:
        query: Conditions on runs, `status=done val_accuracy>0.7`; empty for all runs.
        sort: A key to sort by: metrics best first, other keys ascending, runs without a value last.
        reverse: The opposite order.
        limit: Maximum number of runs: the first of a sorted list, else the newest.
        runs_dir: Folder of the runs; None for $CVLAB_RUNS or ./runs.

    Raises:
        ConfigError: The query or the limit is not valid, or no run has one of the keys.
        RunDirError: `runs_dir` is not a folder.
    """
    from cvlab.reports import index

    for name, value in {"query": query, "sort": sort}.items():
        if not isinstance(value, str) and not (name == "sort" and value is None):
            raise ConfigError(f"{name}: {value!r:.80} is not text", "for example `status=done val_accuracy>0.7`")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit: expected a whole number >= 1, got {limit!r:.80}", "None returns all runs")
    root = root_of(runs_dir)
    rows, _ = index.sorted_runs(root, query, (), sort, reverse, limit)
    return RunList(root, rows, is_sorted=sort is not None or reverse)


def root_of(runs_dir: StrPath | None) -> Path:
    """Return the folder of the runs; None: $CVLAB_RUNS or ./runs."""
    return runs_root(fspath(runs_dir) if runs_dir is not None else None)


def not_none(values: Mapping[str, Any]) -> list[str]:
    """Return the values that are not None as overrides."""
    from cvlab.config.overrides import to_texts

    return to_texts({key: value for key, value in values.items() if value is not None})


def _policy(download: bool, offline: bool, fallback: bool) -> DownloadPolicy:
    """Return how a missing data set is treated."""
    from cvlab.data.resolve import DownloadPolicy

    return DownloadPolicy(offline, download, not fallback)


def _start(loaded: Loaded, policy: DownloadPolicy, runs_dir: StrPath | None, progress: bool) -> Run:
    """Run a configuration in a new run directory."""
    from cvlab.api import run
    from cvlab.api.session import library_call

    with library_call(progress):
        return Run(run.start(loaded, policy, root_of(runs_dir))["run"])


def _load(
    config: StrPath | Mapping[str, Any], overrides: Overrides, values: Mapping[str, Any], is_trusted: bool
) -> Loaded:
    """Return a configuration, given by name, as a file, as a run or as a dictionary, with overrides."""
    from cvlab.config import loading
    from cvlab.config.overrides import to_plain, to_texts
    from cvlab.config.strict_yaml import Document
    from cvlab.runs.trust import require_trust_of

    texts = [*to_texts(overrides), *not_none(values)]
    if isinstance(config, Mapping):
        value = to_plain(config, "configuration")
        source = Path.cwd() / f"{value.get('name') or value.get('experiment') or 'run'}.yaml"
        return loading.load_document(Document(value, {}, "configuration"), source, texts)
    if not isinstance(config, (str, PathLike)):
        raise ConfigError(f"{type(config).__name__} is no configuration", "give a name, a path or a dictionary")
    require_trust_of(fspath(config), is_trusted)
    return loading.load(fspath(config), texts)
