"""Print tables on stdout."""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlab import console
from cvlab.config.metrics import CLASS
from cvlab.reports import data_summary, metrics
from cvlab.runs.records import read_summary
from cvlab.runs.results import Column, read_columns

FORMULA_SIGNS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also the full-width ones
GAP = 3  # between columns, at most
MIN_TEXT = 24  # characters in a line of a column that is wrapped
NUMBER = re.compile(r"[-+]?([\d,]+(\.\d+)?|\.\d+|inf|nan)(e[-+]?\d+)?( ?[%A-Za-z/]{1,8})?( ± \S+)?")
LONGEST_NAME = 24  # characters of an image's name
MAX_PREDICTIONS = 8  # of one cell


MAX_CLASSES = 20  # in a table on the terminal
SPLITS = ("train", "val", "test")


def number(value: Any) -> str:
    """Format a value of a table: integers in full, other numbers with four digits, lists and blocks in brackets."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {number(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(number, value)) + "]"
    if not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table: numbers right-aligned, text left-aligned and wrapped to the terminal; not wrapped in a pipe.

    If the columns do not fit, each row is printed as a block. Cells are plain text: nothing in a name is markup.
    """
    cells = [[console.printable(cell if isinstance(cell, str) else number(cell)) for cell in row] for row in rows]
    columns = [console.printable(column) for column in columns]
    if title:
        print(console.printable(title))
    widths = _widths(columns, cells, _available_width())
    if widths is None:
        for row in cells:
            print("\n".join(f"{column}: {cell}" for column, cell in zip(columns, row, strict=True)), end="\n\n")
        return
    is_right = [_is_numeric([row[index] for row in cells]) for index in range(len(columns))]
    render = _lines if _fits([columns, *cells], widths) and not sys.stdout.isatty() else _wrapped_lines
    print("\n".join(render(columns, cells, widths, is_right)), end="\n\n")


def _fits(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> bool:
    """Return whether all cells are ASCII text of one line that is not wrapped."""
    return all(
        len(cell) <= width and cell.isascii() and cell.isprintable()
        for row in rows
        for cell, width in zip(row, widths, strict=True)
    )


def _lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], is_right: Sequence[bool]
) -> list[str]:
    """Return the lines of a table that `_fits`, as `_wrapped_lines` does, for thousands of rows in less time."""
    space = "  "

    def line(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, is_right, strict=True)
        return space.join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in padded).rstrip()

    return [line(columns), "─" * (sum(widths) + len(space) * (len(widths) - 1)), *map(line, rows)]


def _wrapped_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], is_right: Sequence[bool]
) -> list[str]:
    """Return the lines of a table whose cells are wrapped where they are wider than their column."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, width, right in zip(columns, widths, is_right, strict=True):
        grid.add_column(Text(column), overflow="fold", justify="right" if right else "left", width=width)
    for row in rows:
        grid.add_row(*map(Text, row))
    terminal = Console(width=sum(widths) + GAP * len(widths))
    with terminal.capture() as capture:
        terminal.print(grid)
    return [line.rstrip() for line in capture.get().splitlines()]


def _available_width() -> int:
    """Return the width of the terminal; for a pipe, in which lines are searched, no limit unless $COLUMNS is set."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal():
        return shutil.get_terminal_size().columns
    return sys.maxsize


def _is_numeric(cells: Sequence[str]) -> bool:
    """Return whether the cells of a column are numbers, `-` or empty for none; perhaps with a unit or a deviation."""
    values = [cell for cell in cells if cell not in ("-", "")]
    return bool(values) and all(map(NUMBER.fullmatch, values))


def _num_cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _longest_word(texts: Iterable[str]) -> int:
    return max((_num_cells(word) for text in texts for word in text.split() or [""]), default=0)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """Return the width of each column, None if they do not fit. The first column is never wrapped, nor is a word."""
    texts = [[column, *(row[k] for row in rows)] for k, column in enumerate(columns)]
    natural = [max(_num_cells(line) for text in column for line in text.splitlines() or [""]) for column in texts]
    narrowest = [max(_longest_word(column), min(full, MIN_TEXT)) for column, full in zip(texts, natural, strict=True)]
    narrowest[0] = natural[0]
    spare = available - sum(narrowest) - GAP * len(columns)
    if spare < 0:
        return None
    extra = [full - low for full, low in zip(natural, narrowest, strict=True)]
    share = min(1.0, spare / max(1, sum(extra)))
    return [low + int(share * more) for low, more in zip(narrowest, extra, strict=True)]


def format_measured(verdict: Mapping[str, Any]) -> str:
    """Format the measured values of an expectation: its left side, or all of its sides."""
    return ", ".join(number(value) for value in verdict.get("values", [verdict["measured"]]))


def show_settings(settings: Sequence[Mapping[str, Any]]) -> None:
    """Print the results of a sweep by setting."""
    table("", *settings_rows(settings))


def settings_rows(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a sweep: the varied keys, and mean and standard deviation of each metric."""
    keys = list(settings[0]["keys"]) if settings else []
    named = list(dict.fromkeys(name for row in settings for name in row["metrics"]))
    shown = [name for name in named if metrics.family(name) != "loss"] or named  # table.csv has the others
    short = [key.rpartition(".")[2] for key in keys]
    titles = [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]
    rows = []
    for row in settings:
        means = [_mean(row["metrics"].get(name)) for name in shown]
        rows.append([*(number(row["keys"][key]) for key in keys), ", ".join(row["status"]), str(row["trials"]), *means])
    return [*titles, "status", "n", *shown], rows


def show_importance(record: Mapping[str, Any]) -> None:
    """Print which keys of a sweep matter for its metric, or why nothing can be said."""
    title, rows, note = importance_table(record)
    if rows:
        table(title, ("key", "importance"), rows)
    print(console.printable(note if rows else f"{title}: {note}"))


def importance_table(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], str]:
    """Return title and rows of the importances of keys, and how they were measured, or why there are none."""
    after = f" after {record['after']}" if record.get("after") else ""
    title = f"importance of keys for {record.get('metric')}{after}"
    keys = record.get("keys")
    if not isinstance(keys, dict):
        return title, [], str(record.get("reason", "not known"))
    rows = [(key, f"{share:.0%}") for key, share in keys.items()]
    fit = f"{number(record.get('explained'))} of the variance explained, p = {number(record.get('p'))}"
    return title, rows, f"{record.get('method')}, {record.get('trials')} trials; {fit}"


def _mean(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    deviation = f" ± {metric['sd']:.2g}" if metric["sd"] is not None else ""
    return f"{metric['mean']:.4g}{deviation}"


def show_verification(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print expected and measured values, a line per expectation."""
    columns = ("configuration", "expected", "measured", "verdict", "data", "seconds")
    lines = [
        (
            row["config"],
            row["rule"],
            format_measured(row),
            "met" if row["met"] else "NOT MET",
            row["data"],
            row["seconds"],
        )
        for row in rows
    ]
    table("", columns, lines)


def show_result(result: Mapping[str, Any], with_verdicts: bool = True) -> None:
    """Print the metrics of a run, its expectations with their verdicts, and its directory.

    Args:
        result: The run's result as `--json` prints it; its columns and units are read from the run directory.
        with_verdicts: Also print the expectations.
    """
    path = Path(result["run"])
    summary = read_summary(path)
    note = f" on {result['data']}" if result.get("data") else ""
    if "settings" in result:
        show_settings(result["settings"])
    if "importance" in result:
        show_importance(result["importance"])
    if "results" in result:
        show_photos(result["results"], read_columns(summary), path)
    for record in summary.get("tables", ()):
        table(record["title"], record["columns"], record_rows(record))
    info = summary.get("metric_info", {})
    title = f"{result['experiment']}{note}: {result['status'].replace('_', ' ')}"
    if result["metrics"]:
        show_metrics(title, {**result["metrics"], **summary.get("class_metrics", {})}, info)
    else:
        print(console.printable(title))
    if "reason" in result:
        print(console.printable(f"reason: {result['reason']}"))
        print(console.printable(f"what to do: {result['hint']}"))
    if result["expect"] and with_verdicts:
        verdicts = [(v["rule"], format_measured(v), "met" if v["met"] else "NOT MET") for v in result["expect"]]
        table("", ("expected", "measured", "verdict"), verdicts)
    if "continues" in result:
        print(console.printable("continues {run} at step {step}".format(**result["continues"])))
    print(console.printable(f"run directory {console.relative_path(path)}"))
    if summary.get("headline"):
        print(console.printable(summary["headline"]))


def record_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of a table in a validated summary; those without a value are empty."""
    width = len(record["columns"])
    cells = [["" if cell is None else number(cell) for cell in row[:width]] for row in record["rows"]]
    return [row + [""] * (width - len(row)) for row in cells]


def show_metrics(title: str, values: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Print metrics with their units, and those of classes in a table with a row for each class."""
    plain = {name: value for name, value in values.items() if "/" not in name}
    table(title, ("metric", "value", "unit"), [(n, number(v), metrics.unit(n, info)) for n, v in plain.items()])
    for split, columns, rows in class_tables(values, info):
        table(split, columns, rows[:MAX_CLASSES])
        if len(rows) > MAX_CLASSES:
            print(f"and {len(rows) - MAX_CLASSES} more classes")


def class_tables(values: Mapping[str, Any], info: metrics.MetricInfo) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, columns and rows of the metrics called `MEASURE/CLASS` or `SPLIT_MEASURE/CLASS`.

    There is a table for each split and a row for each class, those with the lowest values first. What is no class, such
    as the strength of an attack, has tables of its own, in the given order.
    """
    tables: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, value in values.items():
        measure, slash, row = name.partition("/")
        if not slash:
            continue
        split, _, rest = measure.partition("_")
        split, measure = (split, rest) if split in SPLITS else ("", measure)
        label = info.get(name, {}).get("label", CLASS)
        tables.setdefault((split, label), {}).setdefault(row, {})[measure] = value
    return [(split, *_class_rows(rows, label)) for (split, label), rows in tables.items()]


def _class_rows(by_class: Mapping[str, Mapping[str, Any]], label: str) -> tuple[list[str], list[list[str]]]:
    measures = list(dict.fromkeys(measure for row in by_class.values() for measure in row))

    def mean(name: str) -> float:
        numbers = [value for value in by_class[name].values() if isinstance(value, (int, float))]
        return sum(numbers) / len(numbers) if numbers else 0.0

    names = sorted(by_class, key=mean) if label == CLASS else list(by_class)
    rows = [[name, *(number(by_class[name].get(key)) for key in measures)] for name in names]
    return [label, *measures], rows


def csv_cell(value: Any) -> Any:
    """Return a value of a CSV file that no spreadsheet takes for a formula; empty for None.

    Text that begins like a formula gets an apostrophe, unless it is a number; control characters are escaped.
    """
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return value
    text = console.printable(str(value))
    is_formula = text.lstrip().startswith(FORMULA_SIGNS) and not NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


def show_photos(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], folder: Path) -> None:
    """Print a line for each image; of a single one all values, one below the other. Files lie below `folder`."""
    details = len(rows) == 1
    used = [column for column in columns if details or not (column.is_detail or column.is_file)]
    used = [column for column in used if any(column.values_of(row) for row in rows)]
    lines: list[list[str]] = []
    for row in rows:
        cells = [_cell_lines(column, row, folder) for column in used] or [["-"]]
        if "error" in row:
            cells = [["not read"], *cells[1:]]
        name = _shortened(Path(row["image"]).name)
        for k in range(max(map(len, cells), default=1)):
            lines.append([name if k == 0 else "", *(cell[k] if k < len(cell) else "" for cell in cells)])
    headings = [column.heading for column in used] or ["result"]
    if len(lines) == 1:
        table("", ("photo", lines[0][0]), list(zip(headings, lines[0][1:], strict=True)))
    else:
        table("", ("photo", *headings), lines)


def _cell_lines(column: Column, row: Mapping[str, Any], folder: Path) -> list[str]:
    values = column.values_of(row)
    if column.is_file:
        return [", ".join(console.relative_path(folder / str(value)) for value in values) or "-"]
    if column.has_lines and values and isinstance(values[0], list) and values[0]:
        return [format_result(item) for item in values[0]]
    return [", ".join(map(format_result, values)) or "-"]


def format_result(value: Any) -> str:
    """Format a value of a result: a prediction as `tabby 0.80`, several joined by commas, others as `number` does."""
    if isinstance(value, list) and all(map(_is_prediction, value)):
        return ", ".join(map(format_result, value[:MAX_PREDICTIONS])) or "nothing"
    return f"{value['label']} {value['score']:.2f}" if _is_prediction(value) else number(value)


def _is_prediction(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("label"), str):
        return False
    score = value.get("score")
    return isinstance(score, float) or (isinstance(score, int) and abs(score) < 2**63)


def _shortened(name: str) -> str:
    half = LONGEST_NAME // 2 - 1
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}..{name[-half:]}"


def show_comparison(comparison: Mapping[str, Any]) -> None:
    """Print the differences between runs, then their metrics."""
    names = [run["label"] for run in comparison["runs"]]
    status = [("status", *(run["status"] for run in comparison["runs"]))]
    if any(run["data"] for run in comparison["runs"]):
        status.append(("data", *(run["data"] or "-" for run in comparison["runs"])))
    differences = [(key, *values) for key, values in comparison["differences"].items()]
    table("differences", ("", *names), [*status, *differences])
    table("metrics", ("", *names, "unit", "better"), metric_rows(comparison))


def metric_rows(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a comparison's metrics: name, a value per run, unit, which direction is better."""
    info = comparison["metric_info"]
    return [
        (name, *map(number, values), metrics.unit(name, info), metrics.better(name, info))
        for name, values in comparison["metrics"].items()
    ]


def show_block(title: str, block: Mapping[str, Any]) -> None:
    """Print keys and values."""
    table(title, ("", "value"), [(key, value) for key, value in block.items()])


def show_summary(result: Mapping[str, Any]) -> None:
    """Print the layers of a model, and the totals."""
    rows = [
        (
            layer["name"],
            layer["layer"],
            " x ".join(map(str, layer["output_shape"] or ())),
            layer["parameters"] or "",
            layer["flops"] or "",
            console.format_bytes(layer["activation_bytes"]) if layer["activation_bytes"] else "",
            _receptive_field(layer["receptive_field"]),
        )
        for layer in result["layers"]
    ]
    columns = ("name", "layer", "output", "parameters", "FLOPs", "activations", "receptive field")
    table("", columns, rows)
    totals = {
        "input": " x ".join(map(str, result["input_shape"])),
        "parameters": f"{result['parameters']:,}, {result['trainable_parameters']:,} of them trainable",
        "memory of parameters": console.format_bytes(result["parameter_bytes"]),
        "memory of activations": f"{console.format_bytes(result['activation_bytes'])} per image",
        "FLOPs": f"{result['flops']:,} per image",
    }
    show_block("", totals)


def _receptive_field(size: Sequence[int] | None) -> str:
    if size is None:
        return ""
    height, width = size
    return str(height) if height == width else f"{height} x {width}"


def show_data(result: Mapping[str, Any]) -> None:
    """Print what `cvlab data show` shows of a data set."""
    columns, rows = data_summary.class_table(result)
    table(str(result["data"]), columns, rows)
    sizes = data_summary.size_lines(result)
    if sizes:
        show_block("", sizes)
    for line in [*data_summary.copy_lines(result), *result["notes"]]:
        console.show(console.printable(line))
    console.show("\n" + "\n".join(console.relative_path(Path(file)) for file in result["files"]))


def show_embedding(result: Mapping[str, Any]) -> None:
    """Print what `cvlab embed` computed."""
    if "nearest" in result:
        rows = [(console.relative_path(Path(row["image"])), f"{row['similarity']:.3f}") for row in result["nearest"]]
        table("nearest photos", ("image", "cosine similarity"), rows)
    if "file" in result:
        text = f"{result['features']} features of {result['photos']} photos: {result['file']}"
        console.show(console.printable(text))


def show_export(result: Mapping[str, Any]) -> None:
    """Print what was exported: the file, its size, its inputs and outputs."""
    about = {
        "file": console.relative_path(Path(result["files"][0])),
        "size": console.format_bytes(result["bytes"]),
        "largest difference": f"{result['largest_difference']:.1e} of the largest output of the model",
        "input": result.get("input"),
        "output": result.get("output"),
        "normalization": "included" if "normalization" in result else None,
        "classes": len(result["classes"]) if "classes" in result else None,
        "weights": f"{result['checkpoint']}, of run {result['run']}",
    }
    show_block("", {key: value for key, value in about.items() if value is not None})


def show_gradients(checks: Iterable[Mapping[str, Any]]) -> None:
    """Print the errors of a gradient check, and what is wrong with each gradient that is wrong."""
    checks = list(checks)
    keys = ("numeric_error", "tolerance", "torch_error")
    rows = [
        (
            check["name"],
            *("-" if check[key] is None else f"{check[key]:.1e}" for key in keys),
            "ok" if check["ok"] else "WRONG",
        )
        for check in checks
    ]
    table("", ("layer", "differences", "tolerance", "torch", "verdict"), rows)
    for check in checks:
        for wrong in check["wrong_gradients"]:
            print(f"{check['name']}: {wrong['name']} {wrong['problem']}")
            if wrong["position"] is not None:
                where = ", ".join(map(str, wrong["position"]))
                values = f"{wrong['value']:.6g}; autograd {wrong['expected']:.6g}, differences {wrong['numeric']:.6g}"
                print(f"  largest error at [{where}]: {values}")
