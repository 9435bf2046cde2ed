"""`cvlab run` and `cvlab resume`: from a valid configuration to a finished run directory."""

import contextlib
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.api import live_trackers, track
from cvlab.config import expectations, loading
from cvlab.config.metrics import metric_info, require_finite
from cvlab.config.schema import DataConfig, ExperimentConfig
from cvlab.data import datasets
from cvlab.data.resolve import DownloadPolicy, describe_data
from cvlab.distributed import collectives, process_group
from cvlab.errors import ConfigError, CvlabError, RunDirError, StoppedError
from cvlab.experiments.base import Experiment
from cvlab.runs import trust
from cvlab.runs.environment import environment
from cvlab.runs.find import config_path, create_run
from cvlab.runs.records import ENDED, is_run, read_continued, read_json, read_status, read_summary
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

Result = dict[str, Any]
MAX_PROCESSES, MAX_THREADS = 1024, 4096  # that env.json may ask for


def used_data(config: ExperimentConfig) -> str | None:
    """Return the name of the data set that a run uses, as the records have it; None if it has no data set."""
    data = config.data_config()
    return describe_data(data) if data is not None else None


def plan(loaded: loading.Loaded, root: Path) -> Result:
    """Return the plan of a run by name; nothing is written and no socket is opened.

    Args:
        loaded: The configuration.
        root: The folder of the runs.

    Raises:
        CvlabError: The run could not start.
    """
    config = loaded.config
    require_trackers(config)
    experiment = registry.get_experiment(config.experiment)
    block = config.data_config()
    used = _data_plan(block) if block is not None else {}
    return {
        "ok": True,
        "experiment": config.experiment,
        "config": str(loaded.source),
        **used,
        **experiment.plan(config, loaded.base),
        **({"profiles": ", ".join(loaded.variants)} if loaded.variants else {}),
        "run": str(root / f"<time>-{config.name}-<id>"),
        "expect": list(rules(config)),
    }


def _data_plan(block: DataConfig) -> Result:
    sources = [datasets.get(name) for name in block.names if not registry.is_user_file(name)]
    missing = [source.name for source in sources if not (source.is_builtin or source.ready(data_root()))]
    to_get = {"fallback": block.fallback, "fetch_command": "; ".join(f"cvlab data fetch {name}" for name in missing)}
    used = {"data": describe_data(block), "data_root": str(data_root()), "data_ready": not missing}
    return used | to_get if missing else used


def start(loaded: loading.Loaded, policy: DownloadPolicy, root: Path) -> Result:
    """Run a configuration in a new run directory.

    Args:
        loaded: The configuration.
        policy: What may be done about missing data.
        root: The folder of the runs.

    Returns:
        The result of the run, see `result`.

    Raises:
        CvlabError: The configuration cannot run, or the run fails or is interrupted.
    """
    experiment = registry.get_experiment(loaded.config.experiment)
    config = experiment.prepare(loaded, policy)
    out = create_directory(config, loaded, root, experiment=experiment)
    with out.locked():
        config = write_inputs(config, loaded, out)
        return _execute(experiment, config, out)


def create(loaded: loading.Loaded, root: Path, is_latest: bool = True) -> Path:
    """Create the run directory of a prepared configuration, which is then resumed; return it."""
    out = create_directory(loaded.config, loaded, root, is_latest)
    with out.locked():
        write_inputs(loaded.config, loaded, out)
    return out.path


def create_distributed(loaded: loading.Loaded, policy: DownloadPolicy, root: Path, processes: int) -> Path:
    """Create the run directory of a training run in several processes, each of which then resumes it.

    Args:
        loaded: The configuration.
        policy: What may be done about missing data.
        root: The folder of the runs.
        processes: Number of processes.

    Returns:
        The run directory.

    Raises:
        ConfigError: The experiment does not train, or the processes cannot share its batches.
    """
    require_processes(loaded, processes)
    experiment = registry.get_experiment(loaded.config.experiment)
    config = experiment.prepare(loaded, policy)
    if getattr(config, "threads", None) is None:
        local = process_group.world().local_size if process_group.world().size > 1 else processes
        config = config.model_copy(update={"threads": process_group.threads_per_process(local)})
    out = create_directory(config, loaded, root)
    with out.locked():
        write_inputs(config, loaded, out, processes)
    return out.path


def create_directory(
    config: ExperimentConfig,
    loaded: loading.Loaded,
    root: Path,
    is_latest: bool = True,
    experiment: Experiment[Any] | None = None,
) -> RunDir:
    """Create the empty run directory of a prepared configuration, once it is known that the run could start."""
    require_trackers(config)
    experiment = experiment or registry.get_experiment(config.experiment)  # what it has loaded serves the run too
    block = config.data_config()
    if block is None or not registry.is_user_file(block.name):
        # raises an error before the run directory exists
        experiment.plan(config, loaded.base)
    return create_run(root, config.name, console.info, is_latest)


def write_inputs(
    config: ExperimentConfig,
    loaded: loading.Loaded,
    out: RunDir,
    processes: int = 1,
    record: Mapping[str, Any] | None = None,
) -> ExperimentConfig:
    """Write a run's configuration and environment; return the configuration, which names only files in its folder.

    Args:
        config: The prepared configuration.
        loaded: Where it comes from.
        out: The run directory; its lock is held.
        processes: Number of processes.
        record: Further entries of env.json.
    """
    config = registry.get_experiment(config.experiment).write_inputs(config, loaded.base, out)
    pin_threads(getattr(config, "threads", None))
    out.write_text("config.yaml", config.to_yaml())
    launched = {"processes": processes, "launch": process_group.launch_id()}
    data = config.data_config()
    fallback = {"data.name": "fallback"} if data is not None and data.fallback_for else {}
    provenance = {"provenance": {**loaded.provenance, **fallback}}
    signature = {trust.SIGNATURE: trust.sign(out.path)}
    out.write_json("env.json", environment() | launched | provenance | signature | dict(record or {}))
    return config


def trackers_of(config: ExperimentConfig) -> tuple[str, ...]:
    """Return the names of the trackers of a run in progress."""
    return getattr(config, "trackers", ())


def require_trackers(config: ExperimentConfig) -> None:
    """Raise ConfigError if a tracker of a configuration is not installed."""
    for name in trackers_of(config):
        track.require_installed(name)


def require_processes(loaded: loading.Loaded, processes: int) -> None:
    """Raise ConfigError unless a configuration trains, and N processes can share its batches."""
    from cvlab.engine.config import TrainConfig

    if not isinstance(loaded.config, TrainConfig):
        raise ConfigError(f"{loaded.source}: {loaded.config.experiment} runs in one process", "leave --nproc out")
    loaded.config.require_shares(processes)


def processes_of(path: Path) -> int:
    """Return the number of processes in which a run was started."""
    return _count(path, read_json(path / "env.json"), "processes", MAX_PROCESSES) or 1


def threads_of(path: Path) -> int | None:
    """Return the number of threads with which a run was started, None if it is not recorded."""
    return _count(path, read_json(path / "env.json"), "threads", MAX_THREADS)


def _count(path: Path, env: Result, key: str, largest: int) -> int | None:
    """Return a number of env.json, None if it has none. RunDirError if it is no whole number from 1 to `largest`."""
    value = env.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest):
        shown = f"{value!r:.40}"
        raise RunDirError(
            f"{path / 'env.json'}: {key} is {shown}, not a number up to {largest}", "the file was changed"
        )
    return value


def has_ended(path: Path) -> bool:
    """Whether a run has its result."""
    return read_json(path / "status.json").get("status") in ENDED and (path / "summary.json").exists()


def resume(path: Path, changed: dict[str, Any] | None = None, allow_changes: bool = False) -> Result:
    """Resume a run from its newest checkpoint; a run that has ended is only reported.

    Args:
        path: The run directory.
        changed: Configuration keys with new values on which the result does not depend.
        allow_changes: Continue although the data or the user's code was changed.

    Returns:
        The result of the run, see `result`.

    Raises:
        CvlabError: The run cannot be resumed, or fails or is interrupted again.
    """
    out = RunDir(path, console.info, writable=process_group.is_main())
    out.allow_changes = allow_changes
    source = config_path(path)
    with out.locked():
        status = collectives.broadcast_from_rank0(lambda: read_json(path / "status.json").get("status"))
        has_started = status is not None
        if status in ENDED and not (path / "summary.json").exists():
            out.log("summary.json is missing: the run is completed again")
        elif status in ENDED:
            console.info(f"{path} has already finished; nothing to resume")
            return result(path)
        config = loading.load(str(source)).config
        if changed:
            config = config.model_copy(update=changed)
            out.write_text("config.yaml", config.to_yaml())
        require_trackers(config)
        saved = any(out.checkpoints.glob("*.pt")) or out.sync_metrics()
        experiment = registry.get_experiment(config.experiment)
        if has_started and not saved and experiment.saves_checkpoints:
            out.log("no checkpoint was saved before the run stopped: it starts from the beginning")
        env = collectives.broadcast_from_rank0(lambda: read_json(path / "env.json"))
        pin_threads(_count(path, env, "threads", MAX_THREADS))
        before = env.get("resumed")
        resumes = [*(before if isinstance(before, list) else []), environment()]
        resumed = {"resumed": resumes} if env and has_started else environment()
        out.write_json("env.json", env | resumed | {trust.SIGNATURE: trust.sign(path)})
        return _execute(experiment, config, out)


def pin_threads(count: int | None) -> None:
    """Set the number of threads of a run: with another number its results differ in the last bits."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def _execute(experiment: Experiment[Any], config: ExperimentConfig, out: RunDir) -> Result:
    """Run the experiment under the lock, and write how it ends to status.json."""
    from cvlab.engine.memory import PeakMemory

    out.log(f"run directory {out.path}")
    source = read_continued(out.path)
    if source is not None:
        out.log(f"continues {source[0]} at step {source[1]}")
    data = used_data(config)
    out.set_status("running", experiment=config.experiment, data=data)
    start_time, peak_memory = time.monotonic(), PeakMemory()
    trackers = live_trackers.LiveTrackers(out, trackers_of(config))
    try:
        metrics = experiment.run(config, out)
        require_finite(metrics, allow_infinite=True)
    except BaseException as error:
        _record_failure(out, error)
        if isinstance(error, CvlabError):
            error.run = str(out.path)
        trackers.finish(has_ended=False)
        raise
    if not out.writable:
        return {}
    known = metrics | out.extra_summary.get("class_metrics", {})
    verdicts = expectations.check_expectations(rules(config), known, experiment.grouped_results(config, out))
    status = "done" if all(verdict["met"] for verdict in verdicts) else "expectations_failed"
    summary = {
        "experiment": config.experiment,
        "name": config.name,
        "status": status,
        "data": data,
        "metrics": metrics,
        "metric_info": metric_info(experiment.reported_metrics(config), metrics),
        "expect": verdicts,
        "seconds": round(time.monotonic() - start_time, 3),
        **peak_memory.megabytes(),
        **_continues(out.path),
        **out.extra_summary,
    }
    out.write_json("summary.json", summary)
    from cvlab.reports import html, plots

    problem = html.suppress_errors(plots.plot_run, out)
    if problem:
        out.log(f"warning: the plots could not be drawn: {problem}")
    out.set_status(status, data=data, error=None, code=None)
    _publish(out)
    trackers.finish(has_ended=True)
    return result(out.path)


def _publish(out: RunDir) -> None:
    """Write the run's page and, unless the run is part of a sweep, the list of all runs; log a warning if they fail."""
    from cvlab.reports import html, index

    problem = html.suppress_errors(html.write_run, out.path)
    root = out.path.parent
    if not problem and not is_run(root.parent):
        problem = html.suppress_errors(lambda: html.write_index(root, index.runs(root)))
    if problem:
        out.log(f"warning: the page about this run could not be written: {problem}")


def rules(config: ExperimentConfig) -> tuple[str, ...]:
    """Return the expectations that apply: those of the fallback data set if it is used."""
    block = config.data_config()
    return config.expect_fallback if block is not None and block.fallback_for else config.expect


def _record_failure(out: RunDir, error: BaseException) -> None:
    is_interrupted = isinstance(error, (StoppedError, KeyboardInterrupt))
    if not out.path.is_dir():
        return  # the user has removed it, which the error says
    try:
        if not isinstance(error, (CvlabError, KeyboardInterrupt)):
            out.append_text("log.txt", "".join(traceback.format_exception(error)))
        code = getattr(error, "code", 130 if is_interrupted else 1)
        out.set_status(
            "interrupted" if is_interrupted else "failed", error=str(error) or type(error).__name__, code=code
        )
        if out.writable:
            with contextlib.suppress(Exception):  # whatever goes wrong with the page, the run's own error is reported
                _publish(out)
    except (CvlabError, OSError) as write_error:
        console.info(f"warning: the status could not be written: {write_error}")


def result(path: Path) -> Result:
    """Return the result of a run that has ended, as `--json` prints it.

    Args:
        path: The run directory.

    Returns:
        `ok`, `run`, `experiment`, `status`, `data`, `metrics`, `expect`, `files`; of a sweep also `settings`,
        `trials` and `importance`, of an experiment on images also `results`, and perhaps `tables`, of one that detects
        objects `headline` and `class_counts`; of a run that continues another one `continues`; of a run without a
        result `reason` and `hint`.
    """
    summary, record = read_summary(path), read_status(path)
    status = record.get("status", "unknown")
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
    return {
        "ok": status == "done",
        "run": str(path),
        "experiment": summary.get("experiment") or record.get("experiment") or "run",
        "status": status,
        "data": summary.get("data") or record.get("data"),
        "metrics": summary.get("metrics", {}),
        "expect": summary.get("expect", []),
        **{
            key: summary[key]
            for key in ("settings", "trials", "importance", "results", "tables", "headline", "class_counts")
            if key in summary
        },
        **_continues(path),
        **_reason(path, record),
        "files": files,
    }


def _continues(path: Path) -> Result:
    source = read_continued(path)
    return {} if source is None else {"continues": {"run": source[0], "step": source[1]}}


def _reason(path: Path, record: Result) -> Result:
    """Return why a run has no result, and what to do; empty if it has one or is still running."""
    status = record.get("status")
    if status not in ("failed", "interrupted"):
        return {}
    reason = record.get("error") or "the process ended without a message; it was killed, or the machine stopped"
    at = f" (at step {record['step']} of {record.get('total_steps', '?')})" if "step" in record else ""
    verb = "continue with" if status == "interrupted" else "remove the cause, then"
    log = console.relative_path(path / "log.txt")
    return {"reason": f"{reason}{at}", "hint": f"{verb} `cvlab resume {path.name}`; the log is {log}"}
