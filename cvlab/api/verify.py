"""Run configurations and check their expectations."""

import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from cvlab import console
from cvlab.api import run
from cvlab.api.sweep import Result
from cvlab.config import loading
from cvlab.data.resolve import DownloadPolicy
from cvlab.errors import CvlabError, ExpectationError


def verify(loaded: Sequence[loading.Loaded], policy: DownloadPolicy, root: Path) -> Result:
    """Run configurations one after the other and gather expected against measured.

    Returns `{"ok", "verified": [{"config", "data", "rule", "measured", "met", "seconds", "run"}]}`; a run that fails
    has one line with its error as `rule`, and its exit code as `code`.
    """
    rows: list[Result] = []
    for one in loaded:
        began = time.monotonic()
        name = one.config.name
        console.info(f"verify {name}")
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
    return int(failed[0]) if failed else ExpectationError.code if missed else 0
