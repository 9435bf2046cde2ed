"""All runs below a folder, a row for each; without torch, so that thousands are listed at once."""

from pathlib import Path

from cvlab.errors import CvlabError
from cvlab.runs.find import list_runs
from cvlab.runs.records import Row, read_status, read_summary

SHOWN_FIRST = (  # of a run's metrics, the first two that it has
    *("test_accuracy", "val_accuracy", "train_accuracy", "map50", "map50_95", "bleu4", "bleu1", "success_rate"),
    *("arms", "diverged", "num_photos", "num_objects", "train_loss"),
)


def runs(root: Path) -> list[Row]:
    """Return one row for each run below `root`, oldest first."""
    return [_run_row(path) for path in list_runs(root)]


def _run_row(path: Path) -> Row:
    row: Row = {"run": path.name, "status": "damaged", "experiment": None, "data": None, "result": "", "metrics": {}}
    try:
        summary, status = read_summary(path), read_status(path)
    except CvlabError as error:
        return row | {"result": error.message}
    metrics = summary.get("metrics", {})
    shown = [f"{name} {metrics[name]:.4g}" for name in SHOWN_FIRST if isinstance(metrics.get(name), (int, float))]
    state = status.get("status", "not begun")
    if state in ("running", "interrupted") and "step" in status:
        shown = [f"step {status['step']} of {status.get('total_steps', '?')}"]
    known = {"status": state, "experiment": status.get("experiment"), "data": status.get("data")}
    return row | known | {"result": ", ".join(shown[:2]), "metrics": metrics}
