"""Compare runs: the differences of their configurations, and their metrics."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlab.reports.tables import csv_cell
from cvlab.runs.find import read_config
from cvlab.runs.records import read_metrics, read_status, read_summary

TIME_STAMP = re.compile(r"^\d{8}-\d{6}-")
UNCOMPARED = ("expect", "expect_fallback", "name")  # keys that do not change what a run computes


def labels(paths: Sequence[Path]) -> dict[str, Path]:
    """Label each run by its directory's name without the time, or by its path if two labels would be the same."""
    short = [TIME_STAMP.sub("", path.name) for path in paths]
    names = short if len(set(short)) == len(set(paths)) else [str(path) for path in paths]
    return dict(zip(names, paths, strict=True))


def compare(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Compare runs by their configurations and metrics.

    Args:
        runs: Run directories by label.

    Returns:
        `runs`: label, path, status and data of each; `differences`: by dotted key of the configuration, and `metrics`:
        by name, one value per run, None if absent; `metric_info`: unit and direction of the metrics. A run without a
        summary is compared by the last value of each metric that it has logged.

    Raises:
        RunDirError: A run has no configuration, or damaged files.
    """
    configs = {label: read_config(path) for label, path in runs.items()}
    metrics = {label: metrics_of(path) for label, path in runs.items()}
    keys = dict.fromkeys(key for flat in configs.values() for key in flat)
    compared = [key for key in keys if key.partition(".")[0] not in UNCOMPARED]
    rows = {key: [configs[label].get(key) for label in runs] for key in compared}
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    return {
        "runs": [
            {"label": label, "path": str(path), "status": status.get("status"), "data": status.get("data")}
            for label, path, status in ((label, path, read_status(path)) for label, path in runs.items())
        ],
        "differences": {key: values for key, values in rows.items() if any(v != values[0] for v in values)},
        "metrics": {name: [metrics[label].get(name) for label in runs] for name in names},
        "metric_info": {
            name: info for path in runs.values() for name, info in read_summary(path).get("metric_info", {}).items()
        },
    }


def metrics_of(path: Path) -> dict[str, Any]:
    """Return a run's final metrics; of a run that has not ended the last value of each metric it has logged."""
    summary = read_summary(path)
    if summary:
        metrics: dict[str, Any] = summary.get("metrics", {})
        return metrics
    last: dict[str, Any] = {}
    for row in read_metrics(path):
        last |= row
    return last


def to_csv(comparison: Mapping[str, Any]) -> str:
    """Write a comparison as CSV: one line per key and metric, one column per run."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["kind", "name", *(csv_cell(run["label"]) for run in comparison["runs"])])
    for kind, block in (("config", "differences"), ("metric", "metrics")):
        for name, values in comparison[block].items():
            writer.writerow([kind, csv_cell(name), *map(csv_cell, values)])
    return buffer.getvalue()
