"""A sweep's arms side by side, read from their run directories: means over seeds, a CSV, one plot per metric."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlab.config.expectations import GroupedResult
from cvlab.errors import CvlabError, DivergedError
from cvlab.reports import plots
from cvlab.reports.compare import read_config
from cvlab.reports.tables import number
from cvlab.runs.records import pruning_reason, read_status, read_summary
from cvlab.runs.run_dir import RunDir

Row = dict[str, Any]
SHOWN_METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_accuracy")
SEED = "seed"
PRUNED = "pruned"  # what tables say of an arm that a search has ended early


def read_trial(arm: Path, told: Mapping[str, Any] | None = None) -> Row:
    """Return an arm's name, status, configuration with dotted keys, metrics, and whether it diverged.

    What the sweep has `told` the arm is taken as it says it: the arm's own file has other names for copied files, and
    the steps that a budget in seconds became. An arm whose files are damaged has no metrics.
    """
    row: Row = {"arm": arm.name, "status": "damaged", "diverged": False, "config": dict(told or {}), "metrics": {}}
    try:
        status, summary = read_status(arm), read_summary(arm)
        row["config"] = {**read_config(arm), **row["config"]}
    except CvlabError:
        return row
    diverged = status.get("code") == DivergedError.code
    state = status.get("status", "not begun")
    state = PRUNED if state == "interrupted" and pruning_reason(arm) is not None else state
    return row | {"status": state, "diverged": diverged, "metrics": summary.get("metrics", {})}


def outcome_text(arm: Path) -> str:
    """Say on one line how an arm has ended."""
    row = read_trial(arm)
    if row["diverged"]:
        return "diverged"
    if row["status"] == PRUNED:
        return f"{PRUNED}: {pruning_reason(arm)}"
    metrics = [f"{name} {number(row['metrics'][name])}" for name in SHOWN_METRICS if name in row["metrics"]]
    return ", ".join([row["status"], *metrics])


def group_rows(found: Sequence[Row], keys: Sequence[str]) -> list[list[Row]]:
    """Put the arms together that are the same in `keys`, in the order of the first of each."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(repr([row["config"].get(key) for key in keys]), []).append(row)
    return list(groups.values())


def trial_metrics(row: Row, diverged_counts_as: Mapping[str, float]) -> dict[str, float]:
    """Return an arm's numbers, those of a diverged one as the sweep says."""
    found = {key: value for key, value in row["metrics"].items() if isinstance(value, (int, float))}
    return {**found, **diverged_counts_as} if row["diverged"] else found


def grouped_results(
    found: Sequence[Row], keys: Sequence[str], diverged_counts_as: Mapping[str, float]
) -> list[GroupedResult]:
    """Return the settings that expectations judge; a metric that one of its seeds lacks is absent."""
    result = []
    for group in group_rows(found, keys):
        measured = [trial_metrics(row, diverged_counts_as) for row in group]
        names = set.intersection(*(set(metrics) for metrics in measured))
        means = {name: sum(metrics[name] for metrics in measured) / len(measured) for name in names}
        keys_of = {key: value for key, value in group[0]["config"].items() if key != SEED}
        result.append(GroupedResult(keys_of, means, sum(row["diverged"] for row in group) / len(group)))
    return result


def setting_rows(found: Sequence[Row], keys: Sequence[str], diverged_counts_as: Mapping[str, float]) -> list[Row]:
    """Return one row per setting: what varies, n, how many diverged, mean and standard deviation of each metric."""
    result = []
    for group in group_rows(found, keys):
        measured = [trial_metrics(row, diverged_counts_as) for row in group]
        spread: dict[str, Row] = {}
        for name in SHOWN_METRICS:
            values = [metrics[name] for metrics in measured if name in metrics]
            if values:
                sd = statistics.stdev(values) if len(values) > 1 else None
                spread[name] = {"mean": sum(values) / len(values), "sd": sd, "n": len(values)}
        told = {key: group[0]["config"].get(key) for key in keys}
        diverged = sum(row["diverged"] for row in group)
        states = sorted({"diverged" if row["diverged"] else row["status"] for row in group})
        result.append({"keys": told, "arms": len(group), "diverged": diverged, "status": states, "metrics": spread})
    return result


def to_csv(found: Sequence[Row], keys: Sequence[str]) -> str:
    """Write one line per arm: its name, status, what varies, seed, metrics."""
    keys = [*keys, SEED]
    names = list(dict.fromkeys(name for row in found for name in row["metrics"]))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "status", *keys, *names])
    for row in found:
        state = "diverged" if row["diverged"] else row["status"]
        values = [row["config"].get(key) for key in keys] + [row["metrics"].get(name) for name in names]
        writer.writerow([row["arm"], state, *("" if value is None else value for value in values)])
    return buffer.getvalue()


def write(out: RunDir, found: Sequence[Row], keys: Sequence[str], diverged_counts_as: Mapping[str, float]) -> None:
    """Write table.csv and a plot per metric into the sweep's directory, and its tables into summary.json."""
    out.extra_summary["settings"] = setting_rows(found, keys, diverged_counts_as)
    out.extra_summary["arms"] = [
        {key: row[key] for key in ("arm", "status", "diverged", "metrics")} | {"seed": row["config"].get(SEED)}
        for row in found
    ]
    out.write_text("table.csv", to_csv(found, keys))
    out.folder("plots")
    for name in SHOWN_METRICS:
        if any(name in setting["metrics"] for setting in out.extra_summary["settings"]):
            out.write_bytes(f"plots/{name}.png", draw(out.extra_summary["settings"], name, out.path.name))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def draw(found: Sequence[Row], metric: str, title: str) -> bytes:
    """Draw a metric over the numeric key with the most values, a line for each setting of the others; return the PNG.

    Where no key is numeric there is a point for each setting. Bars are one standard deviation over seeds.
    """
    from matplotlib.figure import Figure

    x_key = _x_key(found)
    lines: dict[str, list[tuple[Any, float, float]]] = {}
    for index, row in enumerate(found):
        if metric in row["metrics"]:
            others = {key: value for key, value in row["keys"].items() if key != x_key}
            point = (row["keys"][x_key] if x_key else index, row["metrics"][metric]["mean"])
            line = _label(others) if x_key else metric
            lines.setdefault(line, []).append((*point, row["metrics"][metric]["sd"] or 0.0))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    for label, points in lines.items():
        xs, ys, sds = zip(*sorted(points), strict=True)
        style = "o-" if x_key else "o"
        axes.errorbar(xs, ys, yerr=sds if any(sds) else None, fmt=style, capsize=3, label=label, linewidth=1.5)
    _name_x(axes, x_key, found)
    axes.set_ylabel(metric)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=plots.DPI)
    return buffer.getvalue()


def _x_key(found: Sequence[Row]) -> str | None:
    """Return the numeric key with the most values along which some other setting stays the same, if there is one."""
    best, most = None, 1
    for key in found[0]["keys"]:
        values = {row["keys"][key] for row in found if _is_number(row["keys"][key])}
        others = {repr([v for k, v in row["keys"].items() if k != key]) for row in found}
        if all(_is_number(row["keys"][key]) for row in found) and len(values) > most and len(others) < len(found):
            best, most = key, len(values)
    return best


def _label(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {number(value)}" for key, value in keys.items() if value is not None)


def _name_x(axes: Any, x_key: str | None, found: Sequence[Row]) -> None:
    """Name the x axis; logarithmic where its values are decades apart."""
    if x_key is None:
        labels = [_label(row["keys"]) for row in found]
        axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=7)
        return
    values = sorted({row["keys"][x_key] for row in found})
    if values[0] > 0 and values[-1] / values[0] >= 4:
        axes.set_xscale("log")
    if len(values) <= 12:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(x_key)
