"""From a valid configuration to a finished run directory: start, resume, judge, summarise."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cvlab import __version__, arms, config, console, data, expect, experiments, lookup, rundir, userfiles, yamlfile
from cvlab.data.settle import Policy, label, settle
from cvlab.errors import CvlabError, StoppedError
from cvlab.rundir import RunDir
from cvlab.schema import AnyConfig, DataBlock
from cvlab.validation import SWEEP

Result = dict[str, Any]


def prepare(loaded: config.Loaded, policy: Policy) -> AnyConfig:
    """Settle which data and which size the run uses; of a sweep also the sets that it varies, without stand-ins."""
    chosen = loaded.config
    block = data_of(chosen)
    settled = settle(block, policy) if block is not None else None
    if loaded.profiles and settled is not None:
        from cvlab import rates

        chosen = rates.choose_profile(loaded, settled)
    elif settled is not None and settled is not block:
        chosen = chosen.with_data(settled)
    if chosen.experiment == SWEEP:
        yamlfile.parse(chosen.to_yaml(), f"{loaded.source}, with all that is given,")  # or no resume could read it
        arms.settle_data(chosen, loaded.base, policy)
    return chosen


def data_of(chosen: AnyConfig) -> DataBlock | None:
    """Return a configuration's data block, where it has one."""
    return getattr(chosen, "data", None)


def used_data(chosen: AnyConfig) -> str | None:
    """Say which data a run uses."""
    block = data_of(chosen)
    return label(block) if block is not None else None


def plan(loaded: config.Loaded, root: Path) -> Result:
    """Say what a run would do, with the data it names; nothing is written and no socket opened."""
    chosen = loaded.config
    experiment = experiments.find(chosen.experiment)
    block = data_of(chosen)
    used = _data_plan(block) if block is not None else {}
    return {
        "ok": True,
        "experiment": chosen.experiment,
        "config": str(loaded.source),
        **used,
        **experiment.plan(chosen, loaded.base),
        **({"profile": f"measured at the start: {', '.join(loaded.profiles)}"} if loaded.profiles else {}),
        "run": str(root / f"<time>-{chosen.name}-<id>"),
        "expect": list(rules(chosen)),
    }


def _data_plan(block: Any) -> Result:
    source = None if lookup.is_user_file(block.name) else data.find(block.name)
    ready = source is None or source.builtin or source.ready(data.root())
    missing = {} if ready else {"standin": block.standin, "to get it": f"cvlab data fetch {block.name}"}
    return {"data": label(block), "data_root": str(data.root()), "data_ready": ready, **missing}


def start(loaded: config.Loaded, policy: Policy, root: Path) -> Result:
    """Run a configuration in a new run directory and return its result; of a sweep, all arms."""
    chosen = prepare(loaded, policy)
    block = data_of(chosen)
    if block is None or not lookup.is_user_file(block.name):
        experiments.find(chosen.experiment).plan(chosen, loaded.base)  # what cannot work is refused before it exists
    out = rundir.create(root, chosen.name, console.say)
    with out.locked():
        if chosen.experiment == SWEEP:
            arms.make(chosen, loaded.base, out)
            chosen = userfiles.contained(chosen)
        else:
            chosen = userfiles.bring(chosen, loaded.base, out.path)
            _pin_threads(getattr(chosen, "threads", None))
        out.write_text("config.yaml", chosen.to_yaml())
        out.write_json("env.json", environment() | {"provenance": dict(loaded.provenance)})
        return _execute(chosen, out)


def resume(path: Path, changed: dict[str, Any] | None = None) -> Result:
    """Go on with a run from its newest checkpoint; a run that has ended is only reported.

    `changed` are keys that may differ from when it was started, because the result does not depend on them.
    """
    out = RunDir(path, console.say)
    source = rundir.config_file(path)
    with out.locked():
        status = rundir.read_json(path / "status.json").get("status")
        has_begun = status is not None
        if status in ("done", "unmet"):
            console.say(f"{path} has ended; nothing to resume")
            return result(path)
        chosen = config.load(str(source)).config
        if changed:
            chosen = chosen.model_copy(update=changed)
            out.write_text("config.yaml", chosen.to_yaml())
        saved = any(out.checkpoints.glob("*.pt")) or out.sync_metrics()
        if has_begun and not saved and chosen.experiment != SWEEP:
            out.log("nothing was saved before it stopped: it starts from the beginning")
        env = rundir.read_json(path / "env.json")
        _pin_threads(env.get("threads"))
        again = {"resumed": [*env.get("resumed", []), environment()]} if env else environment()
        out.write_json("env.json", env | again)
        return _execute(chosen, out)


def _pin_threads(count: int | None) -> None:
    """Use the number of threads that a run is to have: with another its results differ in the last bits."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def _execute(chosen: AnyConfig, out: RunDir) -> Result:
    """Run the experiment under the lock; whatever ends it is written to status.json."""
    out.log(f"run directory {out.path}")
    used = used_data(chosen)
    out.set_status("running", experiment=chosen.experiment, data=used)
    began = time.monotonic()
    module = experiments.find(chosen.experiment)
    try:
        metrics = module.run(chosen, out, arms.add) if chosen.experiment == SWEEP else module.run(chosen, out)
    except BaseException as error:
        _record_failure(out, error)
        if isinstance(error, CvlabError):
            error.run = str(out.path)
        raise
    settings = module.settings(chosen, out) if chosen.experiment == SWEEP else ()
    verdicts = expect.judge(rules(chosen), metrics, settings)
    status = "done" if all(verdict["met"] for verdict in verdicts) else "unmet"
    summary = {
        "experiment": chosen.experiment,
        "name": chosen.name,
        "status": status,
        "data": used,
        "metrics": metrics,
        "expect": verdicts,
        "seconds": round(time.monotonic() - began, 3),
        **out.facts,
    }
    out.write_json("summary.json", summary)
    from cvlab.report import plots

    plots.plot_run(out)
    out.set_status(status, data=used, error=None, code=None)
    _publish(out)
    return result(out.path)


def _publish(out: RunDir) -> None:
    """Write the run's page and, unless it is an arm of a sweep, the list of all runs; a run can do without either."""
    from cvlab.report import html, overview

    wrong = html.quietly(html.write_run, out.path)
    root = out.path.parent
    if not wrong and not rundir.is_run(root.parent):
        wrong = html.quietly(lambda: html.write_index(root, overview.runs(root)))
    if wrong:
        out.log(f"warning: the page about this run could not be written: {wrong}")


def rules(chosen: AnyConfig) -> tuple[str, ...]:
    """Return the expectations that apply: those of the stand-in where it was used."""
    block = data_of(chosen)
    return chosen.expect_standin if block is not None and block.standin_for else chosen.expect


def _record_failure(out: RunDir, error: BaseException) -> None:
    stopped = isinstance(error, (StoppedError, KeyboardInterrupt))
    if not out.path.is_dir():
        return  # removed meanwhile, which the error says
    try:
        if not isinstance(error, (CvlabError, KeyboardInterrupt)):
            with (out.path / "log.txt").open("a") as file:
                traceback.print_exception(error, file=file)
        code = getattr(error, "code", 130 if stopped else 1)
        out.set_status("interrupted" if stopped else "failed", error=str(error) or type(error).__name__, code=code)
    except (CvlabError, OSError) as second:
        console.say(f"warning: the status could not be written: {second}")


def result(path: Path) -> Result:
    """Return what `--json` prints of a run that has ended."""
    summary = rundir.read_summary(path)
    status = rundir.read_status(path).get("status", "unknown")
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


def environment() -> Result:
    """Return what a run is done with: versions, machine, command line."""
    import numpy
    import torch

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["cvlab", *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "git_commit": _git_commit(),
        "cvlab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda_device": cuda,
    }


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
