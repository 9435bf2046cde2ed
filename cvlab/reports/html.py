"""HTML pages about runs: self-contained, built from the run directories alone; they load nothing.

All numbers can be read without JavaScript, which only adds values under the pointer, sorting and filtering.
"""

import base64
import functools
import io
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvlab.errors import CvlabError
from cvlab.reports import compare, curves, metrics, svg, tables
from cvlab.reports.curves import Curve
from cvlab.reports.svg import Chart
from cvlab.runs.records import Row, read_json, read_status, read_summary
from cvlab.runs.results import Column, read_columns
from cvlab.storage import atomic

FILE, INDEX, COMPARISON = "report.html", "index.html", "comparison.html"
STATUS_CLASSES = {  # of CSS
    "done": "good",
    "expectations_failed": "bad",
    "failed": "bad",
    "damaged": "bad",
    "running": "wait",
    "interrupted": "wait",
}
MAX_IMAGES, MAX_PX = 48, 1000  # of a page; the files in the run directory have their full size
MAX_GIF_BYTES = 2_000_000
QUALITY = 85
WIDE_RATIO = 2.0  # width to height of an image that takes the width of the page
LOG_LINES = 200
SUFFIXES = (".png", ".gif")


@dataclass(frozen=True)
class EmbeddedImage:
    """An image inside a page: its title, its bytes as a data URI, its size in pixels."""

    name: str
    source: str
    width: int
    height: int

    @property
    def is_wide(self) -> bool:
        """Whether the image takes the width of the page."""
        return self.width > WIDE_RATIO * self.height


@dataclass
class ImageGroup:
    """Images that belong together, with a description."""

    title: str = ""
    description: str = ""
    images: list[EmbeddedImage] = field(default_factory=list)


@functools.cache
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cvlab", "assets/pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    margins = {"left": svg.LEFT, "right": svg.RIGHT, "top": svg.TOP, "bottom": svg.BOTTOM}
    environment.globals |= {
        "size": {"width": svg.WIDTH, "height": svg.HEIGHT, **margins},
        "chart_data": _chart_data,
        "refresh": None,
        "home": None,
    }
    return environment


def _render(template: str, **values: Any) -> str:
    text: str = _templates().get_template(template).render(**values)
    return text


def _chart_data(chart: Chart) -> Row:
    return {
        "x": chart.x_name,
        "from": chart.x_from,
        "to": chart.x_to,
        "all": svg.WIDTH,
        "left": svg.LEFT,
        "width": svg.WIDTH - svg.LEFT - svg.RIGHT,
        "lines": [{"name": line.name, "xs": line.xs, "ys": line.ys} for line in chart.lines],
    }


def run_page(path: Path, home: str | None = None, refresh: int | None = None) -> str:
    """Return the page of one run, whatever its status.

    Args:
        path: The run directory.
        home: Address of the list of runs; None for a page without a link to it.
        refresh: Seconds after which the page loads itself again; None for never.

    Raises:
        RunDirError: If files of the run are damaged.
    """
    summary, status, env = read_summary(path), read_status(path), read_json(path / "env.json")
    config, lines = compare.read_config(path), curves.read(path)
    charts = {metrics.file_name(key) for key in metrics.group(lines)}
    groups, num_omitted = _image_groups(path, summary.get("results", []), read_columns(summary), charts)
    values = summary.get("metrics", {}) if summary else {name: ys[-1] for name, (_, ys) in lines.items()}
    info = summary.get("metric_info", {})
    sources = env.get("provenance")
    sources = sources if isinstance(sources, dict) else None
    rows = [
        (key, tables.number(value), sources.get(key, "default") if sources else "") for key, value in config.items()
    ]
    state = str(status.get("status", "not started"))
    run = {
        "name": path.name,
        "status": state,
        "status_class": STATUS_CLASSES.get(state, ""),
        "experiment": summary.get("experiment") or config.get("experiment", ""),
        "data": summary.get("data") or status.get("data"),
        "seconds": tables.number(summary["seconds"]) if "seconds" in summary else None,
        "time": env.get("time"),
        "error": status.get("error"),
        "verdicts": [
            {"rule": row["rule"], "measured": tables.format_measured(row), "met": row["met"]}
            for row in summary.get("expect", [])
        ],
        "metrics": [(n, tables.number(v), metrics.unit(n, info), metrics.better(n, info)) for n, v in values.items()],
        "settings": _settings(summary.get("settings", [])),
        "charts": _charts(lines),
        "groups": groups,
        "num_omitted": num_omitted,
        "changed": [row for row in rows if row[2] not in ("", "default")],
        "config": rows,
        "environment": [(k, str(v)) for k, v in env.items() if k not in ("provenance", "resumed") and v is not None],
        "log": _log(path / "log.txt"),
    }
    return _render("run.html", title=path.name, run=run, home=home, refresh=refresh)


def _settings(settings: Sequence[Row]) -> Row | None:
    if not settings:
        return None
    columns, rows = tables.settings_rows(settings)
    return {"columns": columns, "rows": rows}


def _charts(lines: Mapping[str, Curve]) -> list[Chart]:
    """Return a chart per family of metrics."""
    groups = metrics.group(lines)
    charts = [
        svg.chart(metrics.title(key, names), {name: lines[name] for name in names}) for key, names in groups.items()
    ]
    return [chart for chart in charts if chart is not None]


def _log(path: Path) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""


def _image_groups(
    path: Path, rows: Sequence[Row], columns: Sequence[Column], charts: set[str]
) -> tuple[list[ImageGroup], int]:
    """Return the images of a run, those of one result together, and the number of images left out.

    Plots of the curves that the page has as `charts` are not among them.
    """
    groups: list[ImageGroup] = []
    used: set[str] = set()
    budget = MAX_IMAGES
    for row in rows:
        files = {str(row[column.name]): column.title for column in columns if column.is_file and column.name in row}
        names = [name for name in files if name.endswith(SUFFIXES) and name not in used]
        group = ImageGroup(Path(row["image"]).name, _description(row, columns))
        for name in names[:budget]:
            group.images += _embedded(path, name, files[name])
            used.add(name)
        budget -= len(group.images)
        if group.images or budget > 0:
            groups.append(group)
    rest = [name for name in _files(path) if name not in used | charts]
    last = ImageGroup("" if not groups else "other images")
    for name in rest[:budget]:
        last.images += _embedded(path, name, name)
    if last.images:
        groups.append(last)
    return groups, max(0, len(rest) - max(budget, 0))


def _description(row: Row, columns: Sequence[Column]) -> str:
    """Return the values of a result as text."""
    parts = [row["error"]] if "error" in row else []
    for column in columns:
        values = [tables.format_result(value) for value in column.values_of(row)]
        if values and not column.is_file:
            parts.append(f"{column.title}: {', '.join(values)} {column.unit}".rstrip())
    return "; ".join(parts)


def _files(path: Path) -> list[str]:
    files = [file for name in ("images", "plots") for file in sorted((path / name).glob("*")) if file.is_file()]
    return [str(file.relative_to(path)) for file in files if file.suffix in SUFFIXES]


def _embedded(path: Path, name: str, title: str) -> list[EmbeddedImage]:
    """Return an image of a run, reduced, as bytes in the page; nothing if it cannot be read."""
    from PIL import Image

    file = path / name
    try:
        if not file.resolve().is_relative_to(path.resolve()):
            return []
        with Image.open(file) as image:
            width, height = image.size
            if file.suffix == ".gif" and file.stat().st_size <= MAX_GIF_BYTES:
                return [EmbeddedImage(title, _uri("image/gif", file.read_bytes()), width, height)]
            reduced = image.convert("RGB")
            reduced.thumbnail((MAX_PX, MAX_PX))
    except (OSError, ValueError):
        return []
    buffer = io.BytesIO()
    reduced.save(buffer, "WEBP", quality=QUALITY)
    return [EmbeddedImage(title, _uri("image/webp", buffer.getvalue()), *reduced.size)]


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def comparison_page(runs: Mapping[str, Path]) -> str:
    """Return the page that compares several runs, by label."""
    comparison = compare.compare(runs)
    labels = [run["label"] for run in comparison["runs"]]
    lines: dict[str, dict[str, Curve]] = {}
    for label, path in runs.items():
        for name, curve in curves.read(path).items():
            lines.setdefault(name, {})[label] = curve
    charts = [svg.chart(name, curves_of_run) for name, curves_of_run in lines.items()]
    seconds = [read_summary(path).get("seconds") for path in runs.values()]
    return _render(
        "comparison.html",
        title=f"{len(labels)} runs",
        runs=[
            (run["label"], run["status"] or "-", run["data"] or "-", tables.number(duration))
            for run, duration in zip(comparison["runs"], seconds, strict=True)
        ],
        columns=["", *labels],
        metric_columns=["", *labels, "unit", "better"],
        differences=[(key, *map(tables.number, values)) for key, values in comparison["differences"].items()],
        metrics=tables.metric_rows(comparison),
        charts=[chart for chart in charts if chart is not None],
    )


def index_page(rows: Sequence[Row], link: str = f"{{name}}/{FILE}", refresh: int | None = None) -> str:
    """Return the page that lists runs, newest first.

    Args:
        rows: The runs as `cvlab runs --json` lists them.
        link: Address of a run's page, with `{name}` for its directory.
        refresh: Seconds after which the page loads itself again; None for never.
    """
    lines = [
        {key: row[key] or "" for key in ("run", "status", "experiment", "data", "result")}
        | {
            "status_class": STATUS_CLASSES.get(row["status"], ""),
            "link": link.format(name=urllib.parse.quote(row["run"])),
        }
        for row in reversed(rows)
    ]
    columns = ("run", "status", "experiment", "data", "result")
    return _render("index.html", title="Runs", rows=lines, columns=columns, refresh=refresh)


def write_run(path: Path) -> None:
    """Write a run's page into its directory."""
    atomic.write_text(path / FILE, run_page(path, home=f"../{INDEX}"))


def write_index(root: Path, rows: Sequence[Row]) -> None:
    """Write the list of all runs below `root`."""
    atomic.write_text(root / INDEX, index_page(rows))


def suppress_errors(work: Callable[..., None], *arguments: Any) -> str | None:
    """Call a function that a run can do without; return the message of an error instead of raising it."""
    try:
        work(*arguments)
    except (CvlabError, OSError, ValueError) as error:
        return str(error)
    return None
