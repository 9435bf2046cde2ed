"""Tables for people, on stdout."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

GAP = 3  # between columns, at most
COUNTS = ("steps", "epochs", "parameters", "best_step")


def number(value: Any, name: str = "") -> str:
    """Format a value of a table: counts in full, other numbers with four digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (int, float)):
        return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, (list, tuple)) else str(value)
    if isinstance(value, int) or (name in COUNTS and float(value).is_integer()):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; cells are plain text, so nothing in a name is taken for markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    console = Console()
    if title:
        print(title)
    widths = _widths(columns, cells, console.width)
    if widths is None:
        for row in cells:
            print("\n".join(f"{column}: {cell}" for column, cell in zip(columns, row, strict=True)), end="\n\n")
        return
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        made.add_column(Text(column), overflow="fold", justify="left" if index == 0 else "right", width=width)
    for row in cells:
        made.add_row(*map(Text, row))
    console.print(made, width=max(console.width, sum(widths) + GAP * len(widths)))
    print()


def _longest_word(texts: Iterable[str]) -> int:
    from rich.cells import cell_len

    return max((cell_len(word) for text in texts for word in text.split() or [""]), default=0)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """Return the width of each column; None where words would be torn apart. The first column is never wrapped."""
    from rich.cells import cell_len

    texts = [[column, *(row[k] for row in rows)] for k, column in enumerate(columns)]
    natural = [max(map(cell_len, column)) for column in texts]
    least = [natural[0], *map(_longest_word, texts[1:])]
    spare = available - sum(least) - GAP * len(columns)
    if spare < 0:
        return None
    wanted = [full - low for full, low in zip(natural, least, strict=True)]
    share = min(1.0, spare / max(1, sum(wanted)))
    return [low + int(share * more) for low, more in zip(least, wanted, strict=True)]


def measured(verdict: Mapping[str, Any]) -> str:
    """Format what a rule was judged by: its left side, or all of its sides."""
    return ", ".join(number(value) for value in verdict.get("values", [verdict["measured"]]))


def show_settings(settings: Sequence[Mapping[str, Any]]) -> None:
    """Print the settings of a sweep."""
    table("", *settings_rows(settings))


def settings_rows(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows about a sweep: what varies, and the mean and deviation of each metric over seeds."""
    keys = list(settings[0]["keys"]) if settings else []
    named = list(dict.fromkeys(name for row in settings for name in row["metrics"]))
    metrics = [name for name in named if not name.endswith("loss")] or named  # table.csv has the others
    short = [key.rpartition(".")[2] for key in keys]
    titles = [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]
    rows = []
    for row in settings:
        found = [_mean(row["metrics"].get(name)) for name in metrics]
        rows.append([*(number(row["keys"][key]) for key in keys), ", ".join(row["status"]), str(row["arms"]), *found])
    return [*titles, "status", "n", *metrics], rows


def _mean(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    deviation = f" ± {metric['sd']:.2g}" if metric["sd"] is not None else ""
    return f"{metric['mean']:.4g}{deviation}"


def show_verification(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print expected against measured, a line for each expectation."""
    columns = ("configuration", "expected", "measured", "verdict", "data", "seconds")
    lines = [
        (row["config"], row["rule"], measured(row), "met" if row["met"] else "NOT MET", row["data"], row["seconds"])
        for row in rows
    ]
    table("", columns, lines)


def show_result(result: Mapping[str, Any]) -> None:
    """Print the metrics of a run, its expectations with their verdicts, and where it lies."""
    note = f" on {result['data']}" if result.get("data") else ""
    if "settings" in result:
        show_settings(result["settings"])
    if "results" in result:
        show_photos(result["results"])
    metrics = [(name, number(value, name)) for name, value in result["metrics"].items()]
    table(f"{result.get('experiment')}{note}: {result['status']}", ("metric", "value"), metrics)
    if result["expect"]:
        verdicts = [(v["rule"], measured(v), "met" if v["met"] else "NOT MET") for v in result["expect"]]
        table("", ("expected", "measured", "verdict"), verdicts)
    print(f"run directory {result['run']}")


PHOTO_COLUMNS = {  # of a result -> the title of its column, in this order
    "before": "before",
    "seen": "seen as",
    "found": "found",
    "sentence": "says",
    "fooled": "fooled",
    "steps": "steps",
    "l2": "L2",
    "explained": "explained",
    "second_label": "second net",
    "inside": "inside",
    "layer": "layer",
    "style_drop": "style loss fell by",
    "ssim": "SSIM with the photo",
}
ONE_PHOTO = {
    "linf_255": "largest change /255",
    "psnr_db": "PSNR dB",
    "jpeg": "fooled as JPEG 95, 85, 75",
    "panel": "panel",
    "picture": "picture",
}
LONGEST_NAME = 24
MOST_OBJECTS = 8


def show_photos(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each photo, or for each of its most likely classes; of a single one all that is known."""
    rows: list[dict[str, Any]] = []
    for result in results:
        name = _shortened(Path(result["image"]).name)
        for k, found in enumerate(result.get("top", [result])):
            what = found.get("predicted", found)
            row = {**found, "image": name if k == 0 else ""}
            if "label" in what or "error" in result:
                row["seen"] = seen(what) if "label" in what else "not read"
            if "objects" in result:
                row["found"] = ", ".join(seen(thing) for thing in result["objects"][:MOST_OBJECTS]) or "nothing"
            rows.append(row | ({"explained": seen(found)} if "predicted" in found else {}))
        if "before" in result:
            rows[-1]["before"] = seen(result["before"])
        if "fooled_jpeg95" in result:
            rows[-1]["jpeg"] = ", ".join(number(result[f"fooled_jpeg{q}"]) for q in (95, 85, 75))
    known = PHOTO_COLUMNS | (ONE_PHOTO if len(rows) == 1 else {})
    columns = {key: title for key, title in known.items() if any(key in row for row in rows)}
    cells = [[row["image"], *(number(row.get(key), key) for key in columns)] for row in rows]
    if len(rows) == 1:
        table("", ("photo", cells[0][0]), list(zip(columns.values(), cells[0][1:], strict=True)))
        return
    table("", ("photo", *columns.values()), cells)


def seen(found: Mapping[str, Any]) -> str:
    """Name what was found, and how surely."""
    return f"{found['label']} {found['score']:.2f}"


def _shortened(name: str) -> str:
    half = LONGEST_NAME // 2 - 1
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}..{name[-half:]}"


def show_comparison(comparison: Mapping[str, Any]) -> None:
    """Print what differs between runs, then their metrics."""
    names = [run["label"] for run in comparison["runs"]]
    status = [("status", *(run["status"] for run in comparison["runs"]))]
    if any(run["data"] for run in comparison["runs"]):
        status.append(("data", *(run["data"] or "-" for run in comparison["runs"])))
    differences = [(key, *values) for key, values in comparison["differences"].items()]
    table("what differs", ("", *names), [*status, *differences])
    metrics = [(name, *(number(value, name) for value in values)) for name, values in comparison["metrics"].items()]
    table("metrics", ("", *names), metrics)


def show_block(title: str, block: Mapping[str, Any]) -> None:
    """Print keys and values."""
    table(title, ("", "value"), [(key, value) for key, value in block.items()])


def show_gradients(checks: Iterable[Mapping[str, Any]]) -> None:
    """Print the errors of a gradient check."""
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
