"""From a valid configuration to a finished run directory: start, resume, judge, summarise."""

import time
import traceback
from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.config import expectations, loading
from cvlab.config.metrics import metric_info
from cvlab.config.schema import ExperimentConfig
from cvlab.data import datasets
from cvlab.data.resolve import DownloadPolicy, describe_data
from cvlab.distributed import collectives, process_group
from cvlab.errors import ConfigError, CvlabError, StoppedError
from cvlab.runs.environment import environment
from cvlab.runs.find import config_path, create_run
from cvlab.runs.records import ENDED, is_run, read_json, read_status, read_summary
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root

Result = dict[str, Any]


def used_data(chosen: ExperimentConfig) -> str | None:
    """Say which data a run uses."""
    data = chosen.data_config()
    return describe_data(data) if data is not None else None


def plan(loaded: loading.Loaded, root: Path) -> Result:
    """Say what a run would do, with the data it names; nothing is written and no socket opened."""
    chosen = loaded.config
    experiment = registry.get_experiment(chosen.experiment)
    block = chosen.data_config()
    used = _data_plan(block) if block is not None else {}
    return {
        "ok": True,
        "experiment": chosen.experiment,
        "config": str(loaded.source),
        **used,
        **experiment.plan(chosen, loaded.base),
        **({"chosen at the start": ", ".join(loaded.variants)} if loaded.variants else {}),
        "run": str(root / f"<time>-{chosen.name}-<id>"),
        "expect": list(rules(chosen)),
    }


def _data_plan(block: Any) -> Result:
    source = None if registry.is_user_file(block.name) else datasets.get(block.name)
    ready = source is None or source.is_builtin or source.ready(data_root())
    missing = {} if ready else {"fallback": block.fallback, "to get it": f"cvlab data fetch {block.name}"}
    return {"data": describe_data(block), "data_root": str(data_root()), "data_ready": ready, **missing}


def start(loaded: loading.Loaded, policy: DownloadPolicy, root: Path) -> Result:
    """Run a configuration in a new run directory and return its result; of a sweep, all arms."""
    chosen = registry.get_experiment(loaded.config.experiment).prepare(loaded, policy)
    out = _created(chosen, loaded, root)
    with out.locked():
        chosen = _written(chosen, loaded, out)
        return _execute(chosen, out)


def make(loaded: loading.Loaded, policy: DownloadPolicy, root: Path, processes: int) -> Path:
    """Make the run directory of a training in several processes, and return it; each of them then resumes it.

    ConfigError for an experiment that does not train, or a batch that they cannot share.
    """
    require_processes(loaded, processes)
    chosen = registry.get_experiment(loaded.config.experiment).prepare(loaded, policy)
    if getattr(chosen, "threads", None) is None:
        here = process_group.world().local_size if process_group.world().size > 1 else processes
        chosen = chosen.model_copy(update={"threads": process_group.threads_per_process(here)})
    out = _created(chosen, loaded, root)
    with out.locked():
        _written(chosen, loaded, out, processes)
    return out.path


def _created(chosen: ExperimentConfig, loaded: loading.Loaded, root: Path) -> RunDir:
    block = chosen.data_config()
    if block is None or not registry.is_user_file(block.name):
        registry.get_experiment(chosen.experiment).plan(
            chosen, loaded.base
        )  # what cannot work is refused before it exists
    return create_run(root, chosen.name, console.info)


def _written(chosen: ExperimentConfig, loaded: loading.Loaded, out: RunDir, processes: int = 1) -> ExperimentConfig:
    """Write what a run begins with, and return its configuration, which names nothing outside its folder."""
    chosen = registry.get_experiment(chosen.experiment).write_inputs(chosen, loaded.base, out)
    _pin_threads(getattr(chosen, "threads", None))
    out.write_text("config.yaml", chosen.to_yaml())
    launched = {"processes": processes, "launch": process_group.launch_id()}
    out.write_json("env.json", environment() | launched | {"provenance": dict(loaded.provenance)})
    return chosen


def require_processes(loaded: loading.Loaded, processes: int) -> None:
    """Raise ConfigError unless a configuration trains, and so many processes can share its batches."""
    from cvlab.engine.config import TrainConfig

    if not isinstance(loaded.config, TrainConfig):
        raise ConfigError(f"{loaded.source}: {loaded.config.experiment} runs in one process", "leave --nproc out")
    loaded.config.require_shares(processes)


def processes_of(path: Path) -> int:
    """Return in how many processes a run was begun."""
    count = read_json(path / "env.json").get("processes", 1)
    return count if isinstance(count, int) else 1


def has_ended(path: Path) -> bool:
    """Whether a run has its result."""
    return read_json(path / "status.json").get("status") in ENDED


def resume(path: Path, changed: dict[str, Any] | None = None) -> Result:
    """Go on with a run from its newest checkpoint; a run that has ended is only reported.

    `changed` are keys that may differ from when it was started, because the result does not depend on them.
    """
    out = RunDir(path, console.info, writable=process_group.is_main())
    source = config_path(path)
    with out.locked():
        status = collectives.broadcast_from_rank0(lambda: read_json(path / "status.json").get("status"))
        has_begun = status is not None
        if status in ENDED:
            console.info(f"{path} has ended; nothing to resume")
            return result(path)
        chosen = loading.load(str(source)).config
        if changed:
            chosen = chosen.model_copy(update=changed)
            out.write_text("config.yaml", chosen.to_yaml())
        saved = any(out.checkpoints.glob("*.pt")) or out.sync_metrics()
        if has_begun and not saved and registry.get_experiment(chosen.experiment).saves_checkpoints:
            out.log("nothing was saved before it stopped: it starts from the beginning")
        env = collectives.broadcast_from_rank0(lambda: read_json(path / "env.json"))
        _pin_threads(env.get("threads"))
        again = {"resumed": [*env.get("resumed", []), environment()]} if env else environment()
        out.write_json("env.json", env | again)
        return _execute(chosen, out)


def _pin_threads(count: int | None) -> None:
    """Use the number of threads that a run is to have: with another its results differ in the last bits."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def _execute(chosen: ExperimentConfig, out: RunDir) -> Result:
    """Run the experiment under the lock; whatever ends it is written to status.json."""
    out.log(f"run directory {out.path}")
    used = used_data(chosen)
    out.set_status("running", experiment=chosen.experiment, data=used)
    began = time.monotonic()
    experiment = registry.get_experiment(chosen.experiment)
    try:
        metrics = experiment.run(chosen, out)
    except BaseException as error:
        _record_failure(out, error)
        if isinstance(error, CvlabError):
            error.run = str(out.path)
        raise
    if not out.writable:
        return {}
    verdicts = expectations.check_expectations(rules(chosen), metrics, experiment.grouped_results(chosen, out))
    status = "done" if all(verdict["met"] for verdict in verdicts) else "expectations_failed"
    summary = {
        "experiment": chosen.experiment,
        "name": chosen.name,
        "status": status,
        "data": used,
        "metrics": metrics,
        "metric_info": metric_info(experiment.reported_metrics(chosen), metrics),
        "expect": verdicts,
        "seconds": round(time.monotonic() - began, 3),
        **out.extra_summary,
    }
    out.write_json("summary.json", summary)
    from cvlab.reports import plots

    plots.plot_run(out)
    out.set_status(status, data=used, error=None, code=None)
    _publish(out)
    return result(out.path)


def _publish(out: RunDir) -> None:
    """Write the run's page and, unless it is an arm of a sweep, the list of all runs; a run can do without either."""
    from cvlab.reports import html, index

    wrong = html.suppress_errors(html.write_run, out.path)
    root = out.path.parent
    if not wrong and not is_run(root.parent):
        wrong = html.suppress_errors(lambda: html.write_index(root, index.runs(root)))
    if wrong:
        out.log(f"warning: the page about this run could not be written: {wrong}")


def rules(chosen: ExperimentConfig) -> tuple[str, ...]:
    """Return the expectations that apply: those of the fallback where it was used."""
    block = chosen.data_config()
    return chosen.expect_fallback if block is not None and block.fallback_for else chosen.expect


def _record_failure(out: RunDir, error: BaseException) -> None:
    stopped = isinstance(error, (StoppedError, KeyboardInterrupt))
    if not out.path.is_dir():
        return  # removed meanwhile, which the error says
    try:
        if not isinstance(error, (CvlabError, KeyboardInterrupt)):
            out.append_text("log.txt", "".join(traceback.format_exception(error)))
        code = getattr(error, "code", 130 if stopped else 1)
        out.set_status("interrupted" if stopped else "failed", error=str(error) or type(error).__name__, code=code)
    except (CvlabError, OSError) as second:
        console.info(f"warning: the status could not be written: {second}")


def result(path: Path) -> Result:
    """Return what `--json` prints of a run that has ended."""
    summary = read_summary(path)
    status = read_status(path).get("status", "unknown")
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
    return {
        "ok": status == "done",
        "run": str(path),
        "experiment": summary.get("experiment"),
        "status": status,
        "data": summary.get("data"),
        "metrics": summary.get("metrics", {}),
        "expect": summary.get("expect", []),
        **{key: summary[key] for key in ("settings", "arms", "results") if key in summary},
        "files": files,
    }
