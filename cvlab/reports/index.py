"""List the runs below a folder, without torch, so that thousands are listed at once."""

from pathlib import Path

from cvlab.errors import CvlabError
from cvlab.reports import metrics, tables
from cvlab.runs.find import list_runs
from cvlab.runs.records import Row, read_status, read_summary


def runs(root: Path) -> list[Row]:
    """Return one row for each run below `root`, oldest first."""
    return [_run_row(path) for path in list_runs(root)]


def _run_row(path: Path) -> Row:
    row: Row = {"run": path.name, "status": "damaged", "experiment": None, "data": None, "result": "", "metrics": {}}
    try:
        summary, status = read_summary(path), read_status(path)
    except CvlabError as error:
        return row | {"result": error.message}
    values = summary.get("metrics", {})
    names = metrics.headline(values, summary.get("metric_info", {}))
    result = [f"{name} {tables.number(values[name])}" for name in names]
    state = status.get("status", "not begun")
    if state in ("running", "interrupted") and "step" in status:
        result = [f"step {status['step']} of {status.get('total_steps', '?')}"]
    known = {"status": state, "experiment": status.get("experiment"), "data": status.get("data")}
    return (
        row
        | known
        | {"result": ", ".join(result), "metrics": values}
        | {
            "metric_info": summary.get("metric_info", {}),
            "seconds": summary.get("seconds"),
        }
    )
