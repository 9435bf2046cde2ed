"""HTML pages about runs: self-contained, built from the run directories alone; they load nothing.

All numbers can be read without JavaScript, which only adds values under the pointer, smoothing and logarithmic axes,
sorting, filtering, and the selection of runs to compare.
"""

import base64
import contextlib
import functools
import io
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image

from cvlab import console, portability
from cvlab.errors import CvlabError
from cvlab.reports import colors, compare, curves, data_summary, embedded, metrics, parallel, svg, tables
from cvlab.reports.curves import Curve
from cvlab.reports.svg import Chart
from cvlab.runs.find import read_config
from cvlab.runs.records import Row, is_trial, read_continued, read_json, read_status, read_summary
from cvlab.runs.results import read_columns
from cvlab.runs.rung import early_end_reason
from cvlab.storage import atomic, regular_files
from cvlab.storage.cache import user_cache

FILE, INDEX, COMPARISON = "report.html", "index.html", "comparison.html"
STATUS_CLASSES = {  # of CSS
    "done": "good",
    "expectations_failed": "bad",
    "failed": "bad",
    "damaged": "bad",
    "running": "wait",
    "interrupted": "wait",
}
HIDDEN_ENVIRONMENT = ("provenance", "resumed", "continues")  # entries of env.json that the page has elsewhere or not
LOG_LINES, MAX_LOG_BYTES = 200, 2**18  # of its end
MAX_THUMBNAILS = 200  # of the list of runs: those of the newest
MAX_TRIAL_METRICS = 6
MAX_COMPARED = 300  # newest runs, those whose metrics the list of runs holds


@dataclass(frozen=True)
class Links:
    """Addresses of pages, as seen from one of them.

    Attributes:
        home: The list of runs, or of a trial the page of its sweep; None for a page without a link to it.
        home_title: The text of that link.
        run: The page of a run, with `{name}` for the directory; None: no page links to it.
        trial: The page of a trial of the run on this page.
    """

    home: str | None = None
    home_title: str = "all runs"
    run: str | None = None
    trial: str | None = f"trials/{{name}}/{FILE}"


def _bytecode_cache() -> Any:
    """Return where compiled templates are stored, since compiling takes 0.15 s; None if other users may write there.

    The code is loaded without a check, so it lies beside the user's own cache and not in a shared CVLAB_DATA.
    """
    import jinja2

    class BytecodeCache(jinja2.FileSystemBytecodeCache):
        def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
            with contextlib.suppress(OSError):  # a full or read-only disk: the templates are compiled every time
                super().dump_bytecode(bucket)

    try:
        folder = user_cache() / "pages"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    if not portability.is_private(status):
        return None
    options = zlib.crc32(Path(__file__).read_bytes())  # compiled templates depend on those of the environment
    return BytecodeCache(str(folder), f"{jinja2.__version__}-{options:08x}-%s.bytecode")


@functools.cache
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cvlab", "assets/pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        bytecode_cache=_bytecode_cache(),
        finalize=lambda value: console.printable_lines(value) if type(value) is str else value,
    )
    margins = {"left": svg.LEFT, "right": svg.RIGHT, "top": svg.TOP, "bottom": svg.BOTTOM}
    environment.globals |= {
        "size": {"width": svg.WIDTH, "height": svg.HEIGHT, **margins},
        "parallel_size": {"width": parallel.WIDTH, "height": parallel.HEIGHT, "top": parallel.TOP},
        "num_ranks": parallel.NUM_COLORS,
        "chart_data": _chart_data,
        "refresh": None,
        "light": colors.LIGHT,
        "dark": colors.DARK,
        "dashes": colors.DASHES,
    }
    return environment


def render(template: str, **values: Any) -> str:
    """Return a page, or a part of one, from a template of `cvlab/assets/pages`."""
    text: str = _templates().get_template(template).render(**values)
    return text


def _chart_data(chart: Chart) -> Row:
    return {
        "x": chart.x_name,
        "from": chart.x_from,
        "to": chart.x_to,
        "lines": [{"name": line.name, "xs": line.xs, "ys": line.ys} for line in chart.lines],
    }


def run_page(path: Path, links: Links | None = None, refresh: int | None = None) -> str:
    """Return the page of one run, whatever its status.

    Args:
        path: The run directory.
        links: Addresses of other pages; None for a page without links.
        refresh: Seconds after which the page loads itself again; None for never.

    Raises:
        RunDirError: Files of the run are damaged.
    """
    links = links or Links(trial=None)
    summary, status, env = read_summary(path), read_status(path), read_json(path / "env.json")
    config, lines = read_config(path), curves.read(path)
    groups = embedded.ImageGroups(path)
    groups.add_results(summary.get("results", []), read_columns(summary))
    groups.add_rest({metrics.file_name(key) for key in metrics.group(lines)})
    values = summary.get("metrics", {}) if summary else {name: ys[-1] for name, (_, ys) in lines.items()}
    info, trials = summary.get("metric_info", {}), summary.get("trials", [])
    importance = summary.get("importance") or {}
    sources = _provenance(env)
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
        "headline": summary.get("headline"),
        "duration": duration_text(summary.get("seconds")),
        "time": _utc(env.get("time")),
        "continues": read_continued(path),
        "failure": _failure(path, status),
        "verdicts": [
            {"rule": row["rule"], "measured": tables.format_measured(row), "met": row["met"]}
            for row in summary.get("expect", [])
        ],
        "metrics": [
            (name, tables.number(value), metrics.unit(name, info), metrics.better(name, info))
            for name, value in values.items()
            if "/" not in name
        ],
        "tables": [(row["title"], row["columns"], tables.record_rows(row)) for row in summary.get("tables", [])],
        "class_tables": tables.class_tables({**values, **summary.get("class_metrics", {})}, info),
        "settings": _settings(summary.get("settings", [])),
        "importance": tables.importance_table(importance) if importance else None,
        "parallel": parallel.chart(trials if isinstance(trials, list) else [], importance),
        "trials": _trials(path, links, trials),
        "charts": charts(lines),
        "groups": groups.groups,
        "num_omitted": groups.num_omitted,
        "changed": [row for row in rows if row[2] not in ("", "default")],
        "config": rows,
        "environment": [(k, str(v)) for k, v in env.items() if k not in HIDDEN_ENVIRONMENT and v is not None],
        "log": _log(path / "log.txt"),
    }
    return render("run.html", title=path.name, run=run, links=links, refresh=refresh)


def _provenance(env: Row) -> dict[str, Any] | None:
    """Return where the value of each key comes from, None if the run does not say it."""
    sources = env.get("provenance")
    return sources if isinstance(sources, dict) else None


def data_page(document: Row, picture: bytes) -> str:
    """Return the page about a data set: the sheet of samples, a PNG, and its numbers."""
    columns, lines = data_summary.class_table(document)
    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return render(
        "data.html",
        title=f"data set {document['data']}",
        picture=embedded.EmbeddedImage("training images", source, width, height),
        splits={"columns": columns, "rows": lines},
        sizes=list(data_summary.size_lines(document).items()),
        copies=data_summary.copy_lines(document),
        notes=document["notes"],
    )


def _failure(path: Path, status: Row) -> Row | None:
    """Return what made a run end early, where it was, and what to do; None of a run that has not failed."""
    if status.get("status") not in ("failed", "interrupted"):
        return None
    pruned = early_end_reason(path)
    reached = f"step {status['step']} of {status.get('total_steps', '?')}" if "step" in status else ""
    has_checkpoint = any((path / "checkpoints").glob("*.pt"))
    is_interrupted = status["status"] == "interrupted"
    if pruned is not None:
        return {"title": "Stopped early by the search", "message": pruned, "reached": reached, "commands": []}
    if has_checkpoint or is_interrupted:
        advice = "to continue where it stopped" if has_checkpoint else "to start it again in the same directory"
        commands = [(f"cvlab resume {path.name}", advice)]
    else:
        commands = [(f"cvlab resume {path.name}", "to try again after the cause is removed")]
    return {
        "title": "Interrupted" if is_interrupted else "Failed",
        "message": status.get("error") or "the process ended without writing a reason; the log may have one",
        "reached": reached,
        "commands": commands,
    }


def _settings(settings: Sequence[Row]) -> Row | None:
    if not settings:
        return None
    columns, rows = tables.settings_rows(settings)
    return {"columns": columns, "rows": rows}


def _trials(path: Path, links: Links, trials: object) -> Row | None:
    """Return the trials of a sweep as a table, with the addresses of their pages where these exist."""
    rows = [trial for trial in trials if isinstance(trial, dict)] if isinstance(trials, list) else []
    rows = [trial for trial in rows if isinstance(trial.get("trial"), str) and isinstance(trial.get("metrics"), dict)]
    names = list(dict.fromkeys(name for trial in rows for name in trial["metrics"]))
    shown = [name for name in names if metrics.family(name) in ("loss", "accuracy", "map50")][:MAX_TRIAL_METRICS]
    lines = []
    for trial in rows:
        name = trial["trial"]
        is_linked = Path(name).name == name and (path / "trials" / name / "config.yaml").is_file()
        link = links.trial.format(name=quote(name)) if is_linked and links.trial else None
        status = "diverged" if trial.get("diverged") else str(trial.get("status", ""))
        values = [tables.number(trial["metrics"].get(key)) for key in shown]
        lines.append({"name": name, "link": link, "cells": [status, tables.number(trial.get("seed")), *values]})
    return {"columns": ["trial", "status", "seed", *shown], "rows": lines} if lines else None


def charts(lines: Mapping[str, Curve]) -> list[Chart]:
    """Return a chart per family of metrics."""
    groups = metrics.group(lines)
    charts = [
        svg.chart(metrics.title(key, names), {name: lines[name] for name in names}) for key, names in groups.items()
    ]
    return [chart for chart in charts if chart is not None]


def _log(path: Path) -> str:
    try:
        text = regular_files.read_tail(path, MAX_LOG_BYTES).decode(errors="replace")
        return "\n".join(text.splitlines()[-LOG_LINES:])
    except OSError:
        return ""


def comparison_page(runs: Mapping[str, Path], links: Links | None = None) -> str:
    """Return the page that compares several runs, by label.

    Args:
        runs: The run directories by label.
        links: Addresses of other pages; None for a page without links.
    """
    links = links or Links()
    comparison = compare.compare(runs)
    styles = colors.of_series(runs)
    info = comparison["metric_info"]
    lines: dict[str, dict[str, Curve]] = {}
    for label, path in runs.items():
        for name, curve in curves.read(path).items():
            lines.setdefault(name, {})[label] = curve
    charts = [svg.chart(name, curves_of_run, styles) for name, curves_of_run in lines.items()]
    return render(
        "comparison.html",
        title=f"Comparison of {len(runs)} runs",
        links=links,
        runs=[
            {
                "label": run["label"],
                "style": styles[run["label"]],
                "link": links.run.format(name=quote(path.name)) if links.run else None,
                "cells": (run["status"] or "-", run["data"] or "-", duration_text(read_summary(path).get("seconds"))),
                "status_class": STATUS_CLASSES.get(run["status"], ""),
            }
            for run, path in zip(comparison["runs"], runs.values(), strict=True)
        ],
        columns=list(runs),
        differences=[(key, list(map(tables.number, values))) for key, values in comparison["differences"].items()],
        metrics=[
            {
                "name": name,
                "cells": list(
                    zip(map(tables.number, values), best_values(values, metrics.better(name, info)), strict=True)
                ),
                "unit": metrics.unit(name, info),
                "better": metrics.better(name, info),
            }
            for name, values in comparison["metrics"].items()
        ],
        charts=[chart for chart in charts if chart is not None],
    )


def best_values(values: Sequence[Any], better: str) -> list[bool]:
    """Return for each value of a row whether it is the best; none is if all are equal or no direction is better."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    if better not in ("higher", "lower") or len(set(numbers)) < 2:
        return [False] * len(values)
    best = max(numbers) if better == "higher" else min(numbers)
    return [isinstance(value, (int, float)) and value == best for value in values]


def index_page(
    rows: Sequence[Row],
    link: str = f"{{name}}/{FILE}",
    refresh: int | None = None,
    root: Path | None = None,
    compare_link: str | None = None,
) -> str:
    """Return the page that lists runs, newest first.

    Args:
        rows: The runs as `cvlab runs --json` lists them.
        link: Address of a run's page, with `{name}` for its directory.
        refresh: Seconds after which the page loads itself again; None for never.
        root: Folder of the runs, for thumbnails, and to link only pages that exist; None: neither.
        compare_link: Address of the page that compares the runs whose names follow; None: the page compares their
            metrics itself.
    """
    lines = []
    for k, row in enumerate(reversed(rows)):
        path = root / row["run"] if root is not None else None
        has_page = path is None or compare_link is not None or (path / FILE).is_file()
        lines.append(
            {key: row[key] or "" for key in ("run", "status", "experiment", "data")}
            | {
                "result": _unbroken(row["result"]) if row["metrics"] else row["result"],
                "status_class": STATUS_CLASSES.get(row["status"], ""),
                "link": link.format(name=quote(row["run"])) if has_page else None,
                "thumbnail": embedded.read_thumbnail(path) if path is not None and k < MAX_THUMBNAILS else None,
                "is_selectable": compare_link is not None or k < MAX_COMPARED,
                "date": _date(row["run"]),
                "seconds": row.get("seconds"),
                "duration": duration_text(row.get("seconds")),
            }
        )
    newest = [row for row in rows[::-1][:MAX_COMPARED] if row["metrics"]]
    compared = {row["run"]: row["metrics"] for row in newest}
    directions = {
        name: metrics.better(name, row["metric_info"])
        for row in newest
        for name in row.get("metric_info", {})
        if metrics.better(name, row["metric_info"])
    }
    return render(
        "index.html",
        title="Runs",
        rows=lines,
        compared=compared if compare_link is None else {},
        directions=directions if compare_link is None else {},
        compare_link=compare_link,
        refresh=refresh,
    )


def _unbroken(result: str) -> str:
    """Return names and values, separated by commas, with no line break between a name and its value."""
    return result.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")


def _date(name: str) -> str:
    """Return the date and time in the name of a run directory, in UTC; empty if it has none."""
    match = re.match(r"(\d{8}-\d{6})-", name)
    try:
        return datetime.strptime(match[1], "%Y%m%d-%H%M%S").strftime("%Y-%m-%d %H:%M") if match else ""
    except ValueError:
        return ""


def _utc(time: object) -> str:
    """Return an ISO 8601 time as date and minute in UTC; empty if it is none."""
    try:
        moment = datetime.fromisoformat(time) if isinstance(time, str) else None
        return moment.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if moment is not None else ""
    except (ValueError, OverflowError):
        return ""


def duration_text(seconds: float | None) -> str:
    """Format a duration: `0.8 s`, `42 s`, `3 min 5 s`, `2 h 10 min`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def quote(name: str) -> str:
    """Return a file's name as part of an address, byte by byte if it is not UTF-8."""
    try:
        return urllib.parse.quote(os.fsencode(name))
    except UnicodeEncodeError:  # it is no file's name
        return urllib.parse.quote(name, errors="replace")


def links_from(file: Path, root: Path) -> Links:
    """Return the addresses of the list and of the pages of runs below `root`, relative to a page in a file."""
    folder = quote(os.path.relpath(root, file.parent).replace(os.sep, "/") + "/").removeprefix("./")
    return Links(home=f"{folder}{INDEX}", run=f"{folder}{{name}}/{FILE}")


def write_run(path: Path) -> None:
    """Write a run's page and thumbnail into its directory; the page of a trial links to that of its sweep."""
    links = Links(f"../../{FILE}", "sweep") if is_trial(path) else Links(f"../{INDEX}")
    embedded.write_thumbnail(path)
    atomic.write_text(path / FILE, run_page(path, links))


def write_index(root: Path, rows: Sequence[Row]) -> None:
    """Write the list of all runs below `root`; remove what killed processes have left of earlier lists."""
    for pattern in (f".{INDEX}-*{atomic.TEMPORARY}", ".latest-*"):
        atomic.remove_stale_temporaries(root, pattern)
    atomic.write_text(root / INDEX, index_page(rows, root=root))


def suppress_errors(work: Callable[..., object], *arguments: Any) -> str | None:
    """Call a function that a run can do without; return the message of an error instead of raising it."""
    try:
        work(*arguments)
    except CvlabError as error:
        return str(error)
    except Exception as error:  # whatever other runs hold, or a library makes of it
        return f"{type(error).__name__}: {error}"
    return None
