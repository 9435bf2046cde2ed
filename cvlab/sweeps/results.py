"""Results of a sweep, read from its run directories: means over seeds, a CSV file, one plot per metric."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlab.config.expectations import GroupedResult
from cvlab.errors import CvlabError, DivergedError
from cvlab.reports import colors, plots
from cvlab.reports.tables import csv_cell, number
from cvlab.runs.find import read_config
from cvlab.runs.records import is_number, pruning_reason, read_metrics, read_status, read_summary
from cvlab.runs.run_dir import RunDir
from cvlab.runs.rung import early_end_reason

Row = dict[str, Any]
SHOWN_METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_accuracy")
SEED = "seed"
PRUNED = "pruned"  # the status of a trial that a search has ended early


def read_trial(trial: Path, config: Mapping[str, Any] | None = None) -> Row:
    """Return a trial's name, status, configuration with dotted keys, metrics, and whether it diverged.

    Keys of `config` are taken as the sweep has them: the trial's own file has other names for copied files, and the
    steps that a budget in seconds became. A trial whose files are damaged has no metrics.
    """
    row: Row = {
        "trial": trial.name,
        "status": "damaged",
        "diverged": False,
        "config": dict(config or {}),
        "metrics": {},
        "metric_info": {},
    }
    try:
        status, summary = read_status(trial), read_summary(trial)
        row["config"] = {**read_config(trial), **row["config"]}
        is_pruned = status.get("status") == "interrupted" and early_end_reason(trial) is not None
    except CvlabError:
        return row
    diverged = status.get("code") == DivergedError.code
    state = PRUNED if is_pruned else status.get("status", "not started")
    measured = {key: summary.get(key, {}) for key in ("metrics", "metric_info")}
    return row | measured | {"status": state, "diverged": diverged}


def outcome_text(trial: Path) -> str:
    """Return one line on how a trial has ended."""
    row = read_trial(trial)
    if row["diverged"]:
        return "diverged"
    if row["status"] == PRUNED:
        reason = pruning_reason(trial)
        return f"{PRUNED}: {reason}" if reason is not None else str(early_end_reason(trial))
    metrics = [f"{name} {number(row['metrics'][name])}" for name in SHOWN_METRICS if name in row["metrics"]]
    return ", ".join([row["status"], *metrics])


def is_finite(value: Any) -> bool:
    """Return whether a metric is a finite number."""
    return is_number(value) and math.isfinite(value)


def main_metric(rows: Sequence[Row]) -> str | None:
    """Return the metric by which the trials choose their best weights, else the first one that is shown, or None."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    monitored = [name.removeprefix("best_") for name in names if name.startswith("best_")]
    return next((name for name in (*monitored, *reversed(SHOWN_METRICS)) if name in names), None)


def goal_of(rows: Sequence[Row], metric: str) -> str:
    """Return whether higher or lower values of a metric are better, as the trials declare it."""
    directions = [row["metric_info"].get(metric, {}).get("better") for row in rows]
    return "minimize" if "lower" in directions else "maximize"


def last_value(row: Row, trial: Path, metric: str) -> float | None:
    """Return the final value of a metric, or of a trial that was stopped the last one that was measured; else None."""
    value = row["metrics"].get(metric)
    if value is None and row["status"] == PRUNED:
        value = next((item[metric] for item in reversed(list(read_metrics(trial))) if metric in item), None)
    return value if is_finite(value) else None


def count_steps(trials: Sequence[Path]) -> tuple[int, int]:
    """Return how many steps trials have trained, and how many they would have trained to their ends."""
    trained = full = 0
    for trial in trials:
        try:
            status = read_status(trial)
            steps = [row["step"] for row in read_metrics(trial) if isinstance(row.get("step"), int)]
        except CvlabError:  # it is damaged
            continue
        total = status.get("total_steps")
        if isinstance(total, int):
            full += total
            trained += max([*steps[-1:], status.get("step", 0)])
    return trained, full


def group_rows(rows: Sequence[Row], keys: Sequence[str]) -> list[list[Row]]:
    """Group the trials that are equal in `keys`, in the order of the first of each group."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr([row["config"].get(key) for key in keys]), []).append(row)
    return list(groups.values())


def trial_metrics(row: Row, diverged_values: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a trial; for one that diverged, the values that the sweep sets."""
    metrics = {key: value for key, value in row["metrics"].items() if isinstance(value, (int, float))}
    return {**metrics, **diverged_values} if row["diverged"] else metrics


def grouped_results(
    rows: Sequence[Row], keys: Sequence[str], diverged_values: Mapping[str, float]
) -> list[GroupedResult]:
    """Return the settings that expectations are evaluated on, with the metrics that all of their seeds have."""
    result = []
    for group in group_rows(rows, keys):
        measured = [trial_metrics(row, diverged_values) for row in group]
        names = set.intersection(*(set(metrics) for metrics in measured))
        means = {name: sum(metrics[name] for metrics in measured) / len(measured) for name in names}
        keys_of = {key: value for key, value in group[0]["config"].items() if key != SEED}
        result.append(GroupedResult(keys_of, means, sum(row["diverged"] for row in group) / len(group)))
    return result


def setting_rows(rows: Sequence[Row], keys: Sequence[str], diverged_values: Mapping[str, float]) -> list[Row]:
    """Return a row for each setting: what varies, n, how many diverged, mean and standard deviation of metrics."""
    result = []
    for group in group_rows(rows, keys):
        measured = [trial_metrics(row, diverged_values) for row in group]
        spread: dict[str, Row] = {}
        for name in SHOWN_METRICS:
            values = [metrics[name] for metrics in measured if name in metrics]
            if values:
                sd = statistics.stdev(values) if len(values) > 1 else None
                spread[name] = {"mean": sum(values) / len(values), "sd": sd, "n": len(values)}
        setting = {key: group[0]["config"].get(key) for key in keys}
        diverged = sum(row["diverged"] for row in group)
        states = sorted({"diverged" if row["diverged"] else row["status"] for row in group})
        result.append(
            {"keys": setting, "trials": len(group), "diverged": diverged, "status": states, "metrics": spread}
        )
    return result


def to_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Return a CSV with one line for each trial: name, status, what varies, seed, metrics."""
    keys = [*keys, SEED]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", "status", *map(csv_cell, [*keys, *names])])
    for row in rows:
        state = "diverged" if row["diverged"] else row["status"]
        values = [row["config"].get(key) for key in keys] + [row["metrics"].get(name) for name in names]
        writer.writerow(map(csv_cell, [row["trial"], state, *values]))
    return buffer.getvalue()


def write(out: RunDir, rows: Sequence[Row], keys: Sequence[str], diverged_values: Mapping[str, float]) -> None:
    """Write table.csv and one plot for each metric into the sweep's directory, and the tables into summary.json."""
    out.extra_summary["settings"] = setting_rows(rows, keys, diverged_values)
    out.extra_summary["trials"] = [
        {key: row[key] for key in ("trial", "status", "diverged", "metrics")} | {"seed": row["config"].get(SEED)}
        for row in rows
    ]
    out.write_text("table.csv", to_csv(rows, keys))
    out.folder("plots")
    for name in SHOWN_METRICS:
        if any(name in setting["metrics"] for setting in out.extra_summary["settings"]):
            out.write_bytes(f"plots/{name}.png", draw(out.extra_summary["settings"], name, out.path.name))


def draw(rows: Sequence[Row], metric: str, title: str) -> bytes:
    """Plot a metric over the numeric key with the most values, one line for each setting of the others, as PNG.

    If no key is numeric, there is one point for each setting. Bars are one standard deviation over seeds.
    """
    x_key = _x_key(rows)
    lines: dict[str, list[tuple[Any, float, float]]] = {}
    for index, row in enumerate(rows):
        if metric in row["metrics"]:
            other_keys = {key: value for key, value in row["keys"].items() if key != x_key}
            point = (row["keys"][x_key] if x_key else index, row["metrics"][metric]["mean"])
            line = _label(other_keys) if x_key else metric
            lines.setdefault(line, []).append((*point, row["metrics"][metric]["sd"] or 0.0))
    figure, axes = plots.new_panel(7.5, 4.2)
    styles = colors.of_series(lines) if len(lines) > 1 else dict.fromkeys(lines, colors.of_metrics([metric])[metric])
    for label, points in lines.items():
        xs, ys, sds = zip(*sorted(points), strict=True)
        style = "o-" if x_key else "o"
        color = {"color": styles[label].line["color"]}
        axes.errorbar(
            xs,
            ys,
            yerr=sds if any(sds) else None,
            fmt=style,
            capsize=3,
            label=plots.label(label),
            linewidth=1.5,
            **color,
        )
    _label_x_axis(axes, x_key, rows)
    axes.set_ylabel(metric)
    plots.set_value_axis(axes, [mean for points in lines.values() for _, mean, _ in points], is_fraction=False)
    has_spread = any(sd for points in lines.values() for _, _, sd in points)
    spread = " (mean and standard deviation over seeds)" if has_spread else ""
    heading = f"{metric} by {x_key or 'setting'}{spread}"
    axes.set_title(f"{plots.label(heading)}\n{plots.label(title)}", fontsize=plots.TITLE_SIZE)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    return plots.to_png(figure)


def _x_key(rows: Sequence[Row]) -> str | None:
    """Return the numeric key with the most values along which other settings stay the same, or None."""
    best, max_values = None, 1
    for key in rows[0]["keys"]:
        values = {row["keys"][key] for row in rows if is_number(row["keys"][key])}
        other_keys = {repr([v for k, v in row["keys"].items() if k != key]) for row in rows}
        if (
            all(is_number(row["keys"][key]) for row in rows)
            and len(values) > max_values
            and len(other_keys) < len(rows)
        ):
            best, max_values = key, len(values)
    return best


def _label(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {number(value)}" for key, value in keys.items() if value is not None)


def _label_x_axis(axes: Any, x_key: str | None, rows: Sequence[Row]) -> None:
    """Label the x axis; logarithmic if its values span a factor of 4 or more."""
    if x_key is None:
        labels = [plots.label(_label(row["keys"])) for row in rows]
        axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", rotation_mode="anchor", fontsize=8)
        return
    values = sorted({row["keys"][x_key] for row in rows})
    if values[0] > 0 and values[-1] / values[0] >= 4:
        axes.set_xscale("log")
    if len(values) <= 12:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(plots.label(x_key))
