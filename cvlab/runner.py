"""From a valid configuration to a finished run directory: start, resume, judge, summarise."""

import itertools
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

from cvlab import __version__, config, console, data, expect, experiments, lookup, rundir
from cvlab.data.settle import Policy, label, settle
from cvlab.errors import CvlabError, RunDirError, StoppedError
from cvlab.rundir import RunDir
from cvlab.schema import RunConfig

Result = dict[str, Any]


def prepare(loaded: config.Loaded, policy: Policy) -> RunConfig:
    """Settle which data the run uses."""
    chosen = loaded.config
    block = getattr(chosen, "data", None)
    if block is None:
        return chosen
    settled = settle(block, policy)
    return chosen if settled is block else chosen.model_copy(update={"data": settled})


def plan(loaded: config.Loaded, root: Path) -> Result:
    """Say what a run would do, with the data it names; nothing is written and no socket opened."""
    chosen = loaded.config
    experiment = experiments.find(chosen.experiment)
    used = _data_plan(chosen.data) if hasattr(chosen, "data") else {}
    return {
        "ok": True,
        "experiment": chosen.experiment,
        "config": str(loaded.source),
        **used,
        **experiment.plan(chosen, loaded.base),
        "run": str(root / f"<time>-{chosen.name}-<id>"),
        "expect": list(rules(chosen)),
    }


def _data_plan(block: Any) -> Result:
    source = None if lookup.is_user_file(block.name) else data.find(block.name)
    ready = source is None or source.builtin or source.ready(data.root())
    missing = {} if ready else {"standin": block.standin, "to get it": f"cvlab data fetch {block.name}"}
    return {"data": label(block), "data_root": str(data.root()), "data_ready": ready, **missing}


def start(loaded: config.Loaded, policy: Policy, root: Path) -> Result:
    """Run a configuration in a new run directory and return its result."""
    chosen = prepare(loaded, policy)
    if not lookup.is_user_file(getattr(getattr(chosen, "data", None), "name", "")):
        experiments.find(chosen.experiment).plan(chosen, loaded.base)  # what cannot work is refused before it exists
    out = rundir.create(root, chosen.name, console.say)
    chosen = _bring_user_files(chosen, loaded.base, out)
    _pin_threads(chosen.threads)
    with out.locked():
        out.write_text("config.yaml", chosen.to_yaml())
        out.write_json("env.json", environment())
        return _execute(chosen, out)


def resume(path: Path) -> Result:
    """Go on with a run from its newest checkpoint; a run that has ended is only reported."""
    out = RunDir(path, console.say)
    source = rundir.config_file(path)
    with out.locked():
        status = rundir.read_json(path / "status.json").get("status")
        if status in ("done", "unmet"):
            console.say(f"{path} has ended; nothing to resume")
            return result(path)
        loaded = config.load(str(source))
        if not any(out.checkpoints.glob("*.pt")) and not out.sync_metrics():
            out.log("nothing was saved before it stopped: it starts from the beginning")
        env = rundir.read_json(path / "env.json")
        _pin_threads(env.get("threads"))
        env["resumed"] = [*env.get("resumed", []), environment()]
        out.write_json("env.json", env)
        return _execute(loaded.config, out)


def _pin_threads(count: int | None) -> None:
    """Use the number of threads that a run is to have: with another its results differ in the last bits."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def _execute(chosen: RunConfig, out: RunDir) -> Result:
    """Run the experiment under the lock; whatever ends it is written to status.json."""
    out.log(f"run directory {out.path}")
    used = label(chosen.data) if hasattr(chosen, "data") else None
    out.set_status("running", experiment=chosen.experiment, data=used)
    began = time.monotonic()
    try:
        metrics = experiments.find(chosen.experiment).run(chosen, out)
    except BaseException as error:
        _record_failure(out, error)
        if isinstance(error, CvlabError):
            error.run = str(out.path)
        raise
    verdicts = expect.judge(rules(chosen), metrics)
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
    out.set_status(status, data=used)
    return result(out.path)


def rules(chosen: RunConfig) -> tuple[str, ...]:
    """Return the expectations that apply: those of the stand-in where it was used."""
    block = getattr(chosen, "data", None)
    return chosen.expect_standin if getattr(block, "standin_for", None) else chosen.expect


def _record_failure(out: RunDir, error: BaseException) -> None:
    stopped = isinstance(error, (StoppedError, KeyboardInterrupt))
    try:
        if not isinstance(error, (CvlabError, KeyboardInterrupt)):
            with (out.path / "log.txt").open("a") as file:
                traceback.print_exception(error, file=file)
        out.set_status("interrupted" if stopped else "failed", error=str(error) or type(error).__name__)
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


def _bring_user_files(chosen: RunConfig, base: Path, out: RunDir) -> RunConfig:
    """Copy the user's own .py files into the run directory and let the configuration name the copies."""
    changed = {}
    for key in type(chosen).model_fields:
        block = getattr(chosen, key)
        name = getattr(block, "name", None)
        if isinstance(name, str) and lookup.is_user_file(name):
            file, _, attribute = name.rpartition(":")
            copied = _copy_beside(base / file, out.path)
            changed[key] = block.model_copy(update={"name": f"./{copied}:{attribute}"})
    return chosen.model_copy(update=changed) if changed else chosen


def _copy_beside(source: Path, folder: Path) -> str:
    """Copy a file into a folder under its own name, or with a number where another file has that; return the name."""
    try:
        content = source.read_bytes()
        for number in itertools.count(1):
            name = source.name if number == 1 else f"{source.stem}_{number}{source.suffix}"
            target = folder / name
            if not target.exists():
                target.write_bytes(content)
                return name
            if target.read_bytes() == content:
                return name
    except OSError as error:
        raise RunDirError(f"{source}: cannot be copied to {folder}: {error.strerror}") from error
    raise AssertionError
