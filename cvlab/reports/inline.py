"""Runs and results inside a notebook: fragments of HTML with inline SVG and data URIs, no scripts or styles.

Colors are given as attributes, because notebooks remove style sheets from outputs that they do not trust, and text has
the color of the notebook, which may be dark.
"""

from collections.abc import Sequence
from pathlib import Path

from cvlab.data.photo_paths import MAX_FILE_BYTES
from cvlab.reports import curves, embedded, html, index, metrics, tables
from cvlab.reports.embedded import ImageGroup, ImageGroups
from cvlab.runs.records import Row, read_status, read_summary
from cvlab.runs.results import Column, read_columns
from cvlab.storage import regular_files

MAX_IMAGES, MAX_PX = 12, 900
PHOTO_PX = 320  # of a photo of which a run drew no picture
MAX_CHARTS, MAX_RUNS = 4, 50


def run_html(path: Path) -> str:
    """Return a run: its status, curves or pictures, and final metrics.

    Raises:
        RunDirError: Its files are damaged.
    """
    summary, status = read_summary(path), read_status(path)
    state = str(status.get("status", "not started"))
    lines = curves.read(path) if not summary.get("results") else {}
    values = summary.get("metrics", {}) if summary else {name: ys[-1] for name, (_, ys) in lines.items()}
    shown = [(name, tables.number(value)) for name, value in values.items() if "/" not in name]
    names = metrics.headline(values, summary.get("metric_info", {}))
    return html.render(
        "inline_run.html",
        name=path.name,
        path=str(path),
        state=state.replace("_", " "),
        experiment=summary.get("experiment") or status.get("experiment") or "",
        data=summary.get("data") or status.get("data"),
        duration=html.duration_text(summary.get("seconds")),
        error=status.get("error"),
        failed=[row["rule"] for row in summary.get("expect", []) if not row["met"]],
        metrics=shown,
        headline=", ".join(f"{name} {tables.number(values[name])}" for name in names),
        charts=html.charts(lines)[:MAX_CHARTS],
        groups=_groups(path, summary.get("results", []), read_columns(summary)),
    )


def results_html(path: Path, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return results of a run, each with its pictures."""
    return html.render("inline_results.html", groups=_groups(path, rows, columns))


def runs_html(rows: Sequence[Row]) -> str:
    """Return a table of runs as `cvlab runs --json` lists them, in their order."""
    shown = rows[:MAX_RUNS]
    lines = [[row.get(column) or "" for column in index.COLUMNS] for row in shown]
    return html.render("inline_runs.html", columns=index.COLUMNS, rows_=lines, num_more=len(rows) - len(shown))


def _groups(path: Path, rows: Sequence[Row], columns: Sequence[Column]) -> list[ImageGroup]:
    """Return the results with their pictures; the photo itself where the run drew no picture of it."""
    groups = ImageGroups(path, MAX_IMAGES, MAX_PX)
    groups.add_results(rows, columns)
    photos = {Path(row["image"]).name: Path(row["image"]) for row in rows if Path(row["image"]).is_absolute()}
    for group in groups.groups[:MAX_IMAGES]:
        if not group.images and group.title in photos:
            group.images += embedded.embed(_read(photos[group.title]), "", PHOTO_PX)
    return groups.groups


def _read(path: Path) -> bytes:
    """Return the bytes of a photo; none if it cannot be read."""
    try:
        return regular_files.read_bytes(path, MAX_FILE_BYTES)
    except (OSError, ValueError):
        return b""
