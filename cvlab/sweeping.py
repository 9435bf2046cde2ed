"""`cvlab sweep` and `cvlab verify`: many runs, as one command."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvlab import config, console, rundir, runner
from cvlab.data.settle import Policy
from cvlab.errors import CvlabError, UnmetError
from cvlab.schema import AnyConfig
from cvlab.validation import SWEEP

Result = dict[str, Any]


def start(loaded: config.Loaded, policy: Policy, root: Path, fresh: bool) -> Result:
    """Run a sweep: go on with the newest one of the same configuration that has not ended, unless `fresh`."""
    unfinished = None if fresh else find_unfinished(runner.prepare(loaded, policy), root)
    if unfinished is None:
        return runner.start(loaded, policy, root)
    console.say(f"going on with {unfinished}, which has not ended (--fresh starts anew)")
    return runner.resume(unfinished, {"workers": getattr(loaded.config, "workers", 1)})


def find_unfinished(chosen: AnyConfig, root: Path) -> Path | None:
    """Return the newest sweep below `root` that has stopped before its end and varies the same."""
    for path in reversed(rundir.list_runs(root)):
        status = rundir.read_status(path)
        if status.get("experiment") != SWEEP or status.get("status") not in ("interrupted", "failed"):
            continue
        try:
            other = config.load(str(rundir.config_file(path))).config
        except CvlabError:
            continue
        if _identity(other) == _identity(chosen) and (path / "arms").is_dir():
            return path
    return None


def _identity(chosen: AnyConfig) -> str:
    return chosen.model_copy(update={"workers": 1}).to_yaml()


def verify(loaded: Sequence[config.Loaded], policy: Policy, root: Path) -> Result:
    """Run configurations one after the other and gather expected against measured.

    Returns `{"ok", "verified": [{"config", "data", "rule", "measured", "met", "seconds", "run"}]}`; a run that fails
    has one line with its error as `rule`, and its exit code as `code`.
    """
    rows: list[Result] = []
    for one in loaded:
        began = time.monotonic()
        name = one.config.name
        console.say(f"verify {name}")
        try:
            result = runner.start(one, policy, root)
        except CvlabError as error:
            if error.code in (130, 143):
                raise
            rows.append({"config": name, "rule": str(error), "measured": None, "met": False, "code": error.code})
            rows[-1] |= {"data": None, "seconds": round(time.monotonic() - began, 1), "run": error.run}
            continue
        shared = {"config": name, "data": result["data"], "run": result["run"]}
        shared["seconds"] = round(time.monotonic() - began, 1)
        if not result["expect"]:
            rows.append({**shared, "rule": "nothing is expected", "measured": None, "met": True})
        rows += [{**shared, **verdict} for verdict in result["expect"]]
    return {"ok": all(row["met"] for row in rows), "verified": rows}


def verdict_code(rows: Sequence[Result]) -> int:
    """Return the exit code of a verification: that of the first run that failed, else 3 for a miss, else 0."""
    failed = [row["code"] for row in rows if "code" in row]
    missed = any(not row["met"] for row in rows)
    return int(failed[0]) if failed else UnmetError.code if missed else 0
