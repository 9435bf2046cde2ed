"""Pages about runs: self-contained HTML, made of what is in the run directories; nothing is fetched.

Numbers can be read without a script, which only adds values under the pointer, sorting and filtering.
"""

import base64
import functools
import io
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvlab.errors import CvlabError
from cvlab.reports import compare, curves, plots, svg, tables
from cvlab.reports.curves import Curve
from cvlab.reports.svg import Chart
from cvlab.runs.records import Row, read_json, read_status, read_summary
from cvlab.runs.results import Column, read_columns
from cvlab.storage import atomic

FILE, INDEX, COMPARISON = "report.html", "index.html", "comparison.html"
MOODS = {
    "done": "good",
    "expectations_failed": "bad",
    "failed": "bad",
    "damaged": "bad",
    "running": "wait",
    "interrupted": "wait",
}
MOST_PICTURES, MOST_PX = 48, 1000  # of a page; the files in the run directory are whole
MOST_GIF_BYTES = 2_000_000
QUALITY = 85
WIDE = 2.0  # times as wide as high
LOG_LINES = 200
SUFFIXES = (".png", ".gif")
DRAWN = tuple(f"plots/{name}.png" for name in plots.FAMILIES)  # the page has these curves as charts


@dataclass(frozen=True)
class Picture:
    """A picture inside a page: what it is, its bytes as a data URI, its size in pixels."""

    name: str
    source: str
    width: int
    height: int

    @property
    def is_wide(self) -> bool:
        """Whether it takes the width of the page."""
        return self.width > WIDE * self.height


@dataclass
class Group:
    """Pictures that belong together, with a description."""

    title: str = ""
    description: str = ""
    pictures: list[Picture] = field(default_factory=list)


@functools.cache
def _templates() -> Any:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("cvlab", "assets/pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sides = {"left": svg.LEFT, "right": svg.RIGHT, "top": svg.TOP, "bottom": svg.BOTTOM}
    made.globals |= {
        "size": {"width": svg.WIDTH, "height": svg.HEIGHT, **sides},
        "chart_data": _chart_data,
        "refresh": None,
        "home": None,
    }
    return made


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
    """Return the page of one run, whatever state it is in. RunDirError where its files are damaged."""
    summary, status, env = read_summary(path), read_status(path), read_json(path / "env.json")
    groups, left_out = _pictures(path, summary.get("results", []), read_columns(summary))
    config, lines = compare.read_config(path), curves.read(path)
    measured = summary.get("metrics", {}) if summary else {name: ys[-1] for name, (_, ys) in lines.items()}
    told = env.get("provenance")  # runs of before have none
    told = told if isinstance(told, dict) else None
    rows = [(key, tables.number(value), told.get(key, "default") if told else "") for key, value in config.items()]
    state = str(status.get("status", "not begun"))
    run = {
        "name": path.name,
        "state": state,
        "mood": MOODS.get(state, ""),
        "experiment": summary.get("experiment") or config.get("experiment", ""),
        "data": summary.get("data") or status.get("data"),
        "seconds": tables.number(summary["seconds"]) if "seconds" in summary else None,
        "time": env.get("time"),
        "error": status.get("error"),
        "verdicts": [
            {"rule": row["rule"], "measured": tables.measured(row), "met": row["met"]}
            for row in summary.get("expect", [])
        ],
        "metrics": [(name, tables.number(value, name)) for name, value in measured.items()],
        "settings": _settings(summary.get("settings", [])),
        "charts": _charts(lines),
        "groups": groups,
        "left_out": left_out,
        "chosen": [row for row in rows if row[2] not in ("", "default")],
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


def _charts(found: Mapping[str, Curve]) -> list[Chart]:
    """Return a chart for each family of metrics, and one for each metric of none."""
    grouped: dict[str, dict[str, Curve]] = {}
    for name, curve in found.items():
        grouped.setdefault(plots.FAMILIES.get(plots.family(name) or "", name), {})[name] = curve
    rates = grouped.pop(plots.FAMILIES["lr"], None)  # what was set comes after what was measured
    made = [svg.chart(title, lines) for title, lines in grouped.items()]
    made += [svg.chart(plots.FAMILIES["lr"], rates)] if rates else []
    return [chart for chart in made if chart is not None]


def _log(path: Path) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""


def _pictures(path: Path, rows: Sequence[Row], columns: Sequence[Column]) -> tuple[list[Group], int]:
    """Return the pictures of a run, those of an image together, and how many there are besides."""
    groups: list[Group] = []
    used: set[str] = set()
    budget = MOST_PICTURES
    for row in rows:
        files = {str(row[column.name]): column.title for column in columns if column.is_file and column.name in row}
        names = [name for name in files if name.endswith(SUFFIXES) and name not in used]
        group = Group(Path(row["image"]).name, _description(row, columns))
        for name in names[:budget]:
            group.pictures += _embedded(path, name, files[name])
            used.add(name)
        budget -= len(group.pictures)
        if group.pictures or budget > 0:
            groups.append(group)
    rest = [name for name in _files(path) if name not in used]
    last = Group("" if not groups else "others")
    for name in rest[:budget]:
        last.pictures += _embedded(path, name, name)
    if last.pictures:
        groups.append(last)
    return groups, max(0, len(rest) - max(budget, 0))


def _description(row: Row, columns: Sequence[Column]) -> str:
    """Return the values of a result as text."""
    parts = [row["error"]] if "error" in row else []
    for column in columns:
        values = [tables.format_result(value) for value in column.values_of(row)]
        if values and not column.is_file:
            parts.append(" ".join([column.title, ", ".join(values), *([column.unit] if column.unit else [])]))
    return "; ".join(parts)


def _files(path: Path) -> list[str]:
    found = [file for name in ("images", "plots") for file in sorted((path / name).glob("*")) if file.is_file()]
    names = [str(file.relative_to(path)) for file in found if file.suffix in SUFFIXES]
    return [name for name in names if name not in DRAWN]


def _embedded(path: Path, name: str, title: str) -> list[Picture]:
    """Return a picture of a run, made smaller, as bytes in the page; nothing where it cannot be read."""
    from PIL import Image

    file = path / name
    try:
        if not file.resolve().is_relative_to(path.resolve()):
            return []
        with Image.open(file) as image:
            width, height = image.size
            if file.suffix == ".gif" and file.stat().st_size <= MOST_GIF_BYTES:
                return [Picture(title, _uri("image/gif", file.read_bytes()), width, height)]
            small = image.convert("RGB")
            small.thumbnail((MOST_PX, MOST_PX))
    except (OSError, ValueError):
        return []
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY)
    return [Picture(title, _uri("image/webp", buffer.getvalue()), *small.size)]


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def comparison_page(runs: Mapping[str, Path]) -> str:
    """Return the page of several runs side by side."""
    found = compare.compare(runs)
    labels = [run["label"] for run in found["runs"]]
    lines: dict[str, dict[str, Curve]] = {}
    for label, path in runs.items():
        for name, curve in curves.read(path).items():
            lines.setdefault(name, {})[label] = curve
    made = [svg.chart(name, each) for name, each in lines.items()]
    seconds = [read_summary(path).get("seconds") for path in runs.values()]
    return _render(
        "comparison.html",
        title=f"{len(labels)} runs",
        runs=[
            (run["label"], run["status"] or "-", run["data"] or "-", tables.number(spent))
            for run, spent in zip(found["runs"], seconds, strict=True)
        ],
        columns=["", *labels],
        differences=[(key, *map(tables.number, values)) for key, values in found["differences"].items()],
        metrics=[(key, *(tables.number(v, key) for v in values)) for key, values in found["metrics"].items()],
        charts=[chart for chart in made if chart is not None],
    )


def index_page(rows: Sequence[Row], link: str = f"{{name}}/{FILE}", refresh: int | None = None) -> str:
    """Return the page that lists runs, newest first; `rows` as `cvlab runs --json` has them."""
    shown = [
        {key: row[key] or "" for key in ("run", "status", "experiment", "data", "result")}
        | {"mood": MOODS.get(row["status"], ""), "link": link.format(name=urllib.parse.quote(row["run"]))}
        for row in reversed(rows)
    ]
    columns = ("run", "state", "experiment", "data", "result")
    return _render("index.html", title="Runs", rows=shown, columns=columns, refresh=refresh)


def write_run(path: Path) -> None:
    """Write a run's page into its directory."""
    atomic.write_text(path / FILE, run_page(path, home=f"../{INDEX}"))


def write_index(root: Path, rows: Sequence[Row]) -> None:
    """Write the list of all runs below `root`."""
    atomic.write_text(root / INDEX, index_page(rows))


def suppress_errors(work: Any, *arguments: Any) -> str | None:
    """Do what a run can do without: return what was wrong, instead of raising it."""
    try:
        work(*arguments)
    except (CvlabError, OSError, ValueError) as error:
        return str(error)
    return None
