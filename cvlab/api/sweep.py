"""`cvlab sweep` and `cvlab verify`: many runs, as one command."""

import dataclasses
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.api import run
from cvlab.config import loading
from cvlab.config.schema import AnyConfig
from cvlab.config.validation import SWEEP
from cvlab.data.resolve import Policy
from cvlab.errors import CvlabError, UnmetError
from cvlab.runs import run_dir, user_code

Result = dict[str, Any]
WHERE = ("workers", "submit")  # keys of a sweep on which its results do not depend


def start(loaded: loading.Loaded, policy: Policy, root: Path, fresh: bool) -> Result:
    """Run a sweep: go on with the newest one of the same configuration that has not ended, unless `fresh`."""
    registry.get_experiment(SWEEP).plan(
        loaded.config, loaded.base
    )  # what is not installed is said before anything is touched
    loaded = dataclasses.replace(loaded, config=run.prepare(loaded, policy))
    unfinished = None if fresh else find_unfinished(loaded, root)
    if unfinished is None:
        return run.start(loaded, policy, root)
    console.say(f"going on with {unfinished}, which has not ended (--fresh starts anew)")
    return run.resume(unfinished, {key: getattr(loaded.config, key) for key in WHERE})


def find_unfinished(loaded: loading.Loaded, root: Path) -> Path | None:
    """Return the newest sweep below `root` that has stopped before its end and varies the same, with the same files."""
    chosen = loaded.config
    for path in reversed(run_dir.list_runs(root)):
        status = run_dir.read_status(path)
        if status.get("experiment") != SWEEP or status.get("status") not in ("interrupted", "failed"):
            continue
        try:
            other = loading.load(str(run_dir.config_file(path))).config
        except Exception:  # an old one's own file may raise anything when it is imported
            continue
        same = _identity(other) == _identity(user_code.contained(chosen)) and (path / "arms").is_dir()
        if same and user_code.same_files(chosen.model_dump(), loaded.base, path):
            return path
    return None


def _identity(chosen: AnyConfig) -> str:
    return chosen.model_copy(update={key: type(chosen).model_fields[key].default for key in WHERE}).to_yaml()


def verify(loaded: Sequence[loading.Loaded], policy: Policy, root: Path) -> Result:
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
            result = run.start(one, policy, root)
        except CvlabError as error:
            if error.code in (130, 143):
                raise
            rows.append(_failed(name, str(error), error.code, began, error.run))
            continue
        except Exception as error:  # the user's own code; the other configurations are run all the same
            traceback.print_exception(error)
            rows.append(_failed(name, f"{type(error).__name__}: {error}", 1, began, None))
            continue
        shared = {"config": name, "data": result["data"], "run": result["run"]}
        shared["seconds"] = round(time.monotonic() - began, 1)
        if not result["expect"]:
            rows.append({**shared, "rule": "nothing is expected", "measured": None, "met": True})
        rows += [{**shared, **verdict} for verdict in result["expect"]]
    return {"ok": all(row["met"] for row in rows), "verified": rows}


def _failed(name: str, said: str, code: int, began: float, run: str | None) -> Result:
    seconds = round(time.monotonic() - began, 1)
    row = {"config": name, "data": None, "run": run, "seconds": seconds, "rule": said, "measured": None}
    return {**row, "met": False, "code": code}


def verdict_code(rows: Sequence[Result]) -> int:
    """Return the exit code of a verification: that of the first run that failed, else 3 for a miss, else 0."""
    failed = [row["code"] for row in rows if "code" in row]
    missed = any(not row["met"] for row in rows)
    return int(failed[0]) if failed else UnmetError.code if missed else 0
