"""Run configurations and check their expectations."""

import time
from collections.abc import Sequence
from pathlib import Path

from cvlab import console
from cvlab.api import run
from cvlab.api.sweep import Result
from cvlab.config import loading
from cvlab.data.resolve import DownloadPolicy
from cvlab.errors import CvlabError, ExpectationError


def verify(loaded: Sequence[loading.Loaded], policy: DownloadPolicy, root: Path) -> Result:
    """Run configurations one after the other and check their expectations.

    Args:
        loaded: The configurations.
        policy: What may be done about missing data.
        root: The folder of the runs.

    Returns:
        `ok`, and `verified`: one row per expectation with `config`, `data`, `rule`, `measured`, `met`, `seconds` and
        `run`; a run that fails has one row with its error as `rule` and its exit code as `code`.
    """
    rows: list[Result] = []
    for one in loaded:
        start = time.monotonic()
        name = one.config.name
        console.info(f"verify {name}")
        try:
            result = run.start(one, policy, root)
        except CvlabError as error:
            if error.code in (130, 143):
                raise
            rows.append(_failed(name, str(error), error.code, start, error.run))
            continue
        except Exception as error:  # of the user's own code; the other configurations are run nevertheless
            console.show_traceback(error)
            rows.append(_failed(name, f"{type(error).__name__}: {error}", 1, start, None))
            continue
        shared = {"config": name, "data": result["data"], "run": result["run"]}
        shared["seconds"] = round(time.monotonic() - start, 1)
        if not result["expect"]:
            rows.append({**shared, "rule": "no expectation", "measured": None, "met": True})
        rows += [{**shared, **verdict} for verdict in result["expect"]]
    return {"ok": all(row["met"] for row in rows), "verified": rows}


def _failed(name: str, message: str, code: int, start: float, run: str | None) -> Result:
    seconds = round(time.monotonic() - start, 1)
    row = {"config": name, "data": None, "run": run, "seconds": seconds, "rule": message, "measured": None}
    return {**row, "met": False, "code": code}


def verdict_code(rows: Sequence[Result]) -> int:
    """Return the exit code: that of the first run that failed, else 3 if an expectation failed, else 0."""
    failed = [row["code"] for row in rows if "code" in row]
    is_missed = any(not row["met"] for row in rows)
    return int(failed[0]) if failed else ExpectationError.code if is_missed else 0
