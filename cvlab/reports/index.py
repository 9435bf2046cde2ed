"""List the runs below a folder, without torch, so that thousands are listed at once."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cvlab.reports import metrics, tables
from cvlab.runs import query
from cvlab.runs.index import RunRecord
from cvlab.runs.records import Row

COLUMNS = ("run", "status", "experiment", "data", "result")  # of the list, without --columns
UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def runs(root: Path, text: str = "") -> list[Row]:
    """Return one row for each run below `root` that fulfills a query, oldest first."""
    return [run_row(record) for record in query.search(root, text)[0]]


def sorted_runs(
    root: Path, text: str, columns: tuple[str, ...], sort: str | None, reverse: bool, limit: int | None
) -> tuple[list[Row], int]:
    """Return rows of runs with the values of some keys.

    Args:
        root: The folder of the runs.
        text: A query.
        columns: Keys whose values a row has in `values`.
        sort: Sort by this key: metrics by what they declare to be better, best first, other keys ascending; runs
            without a value come last in any case. None: oldest first.
        reverse: The other order.
        limit: Maximum number of rows: the first of a sorted list, else the newest.

    Returns:
        The rows, and how many runs fulfill the query.
    """
    keys = tuple(dict.fromkeys([*columns, *([sort] if sort else [])]))
    records, functions = query.search(root, text, keys)
    count = len(records)
    if sort is not None:
        records = _sort(records, functions[sort], sort, reverse)
        records = records[:limit]
    else:
        records = records[-limit:] if limit is not None else records
        records = records[::-1] if reverse else records
    return [run_row(record) | {"values": {key: functions[key](record) for key in keys}} for record in records], count


def _sort(records: list[RunRecord], value_of: Any, key: str, reverse: bool) -> list[RunRecord]:
    """Sort stably; numbers come before text, and runs without a value last."""
    valued = [(value, record) for record in records if (value := value_of(record)) is not None]
    directions = [metrics.better(key, record.metric_info) for record in records if key in record.metrics]
    descending = (next(filter(None, directions), "") == "higher") != reverse

    def order(pair: tuple[Any, RunRecord]) -> tuple[bool, float, str]:
        value = pair[0]
        is_number = isinstance(value, (int, float))
        return (not is_number, float(value) if is_number else 0.0, "" if is_number else query.plain_text(value))

    valued.sort(key=order, reverse=descending)
    return [record for _, record in valued] + [record for record in records if value_of(record) is None]


def run_row(record: RunRecord) -> Row:
    """Return what the list shows of a run."""
    names = metrics.headline(record.metrics, record.metric_info)
    result = [f"{name} {tables.number(record.metrics[name])}" for name in names]
    if record.status in ("running", "interrupted") and record.step is not None:
        result = [f"step {record.step} of {record.total_steps if record.total_steps is not None else '?'}"]
    return {
        "run": record.run,
        "status": record.status,
        "experiment": record.experiment,
        "data": record.data,
        "result": record.error or ", ".join(result),
        "metrics": record.metrics,
        "metric_info": record.metric_info,
        "seconds": record.seconds,
        "tags": record.tags,
        "starred": record.starred,
        "note": record.note,
    }


def format_value(key: str, value: Any) -> str:
    """Format the value of a key for a table."""
    if value is None:
        return "-"
    if key == "started":
        return datetime.fromtimestamp(value, timezone.utc).strftime("%Y-%m-%d %H:%M")
    if key == "age":
        size, unit = next((pair for pair in UNITS if value >= pair[0]), UNITS[-1])
        return f"{value / size:.0f}{unit}"
    return " ".join(value) or "-" if key == "tags" else tables.number(value)


def table_rows(rows: list[Row], columns: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of the list of runs.

    Args:
        rows: Rows of `sorted_runs`.
        columns: The keys to show besides run and status; empty for the usual ones.
    """
    if columns:
        shown = [key for key in columns if key not in ("run", "status")]
        header = ["run", "status", *shown]
        cells = [[row["run"], row["status"], *(format_value(key, row["values"][key]) for key in shown)] for row in rows]
        return header, cells
    extra = list(dict.fromkeys(key for row in rows[:1] for key in row["values"] if key not in COLUMNS))
    marks = any(row["tags"] or row["starred"] for row in rows)
    header = [*COLUMNS, *(["tags"] if marks and "tags" not in extra else []), *extra]
    cells = []
    for row in rows:
        tags = " ".join([*(["*"] if row["starred"] else []), *row["tags"]]) or "-"
        added = {"tags": tags} | {key: format_value(key, row["values"][key]) for key in extra}
        cells.append([added.get(column) or row.get(column) or "-" for column in header])
    return header, cells
