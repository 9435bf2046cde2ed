"""The commands that only look: runs, comparisons, configurations, models, data, this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cvlab.cli.options import (
    Debug,
    Json,
    Overrides,
    RunArgument,
    RunsDir,
    SetOption,
    complete_config,
    complete_run,
    overrides_of,
    show,
)

app = typer.Typer()
models_app = typer.Typer(help="List models, and fetch weights.", invoke_without_command=True)
data_app = typer.Typer(help="List, fetch and check data sets.", no_args_is_help=True)


@app.command("runs")
def list_runs(
    last: Annotated[int, typer.Option(min=1, help="show the newest so many; --json has all")] = 200,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs, the newest last."""
    from cvlab.reports import index, tables
    from cvlab.runs.find import runs_root

    rows = index.runs(runs_root(runs_dir))
    columns = ("run", "status", "experiment", "data", "result")
    title = f"the newest {last} of {len(rows)} runs; --last {len(rows)} shows all" if len(rows) > last else ""
    shown = [[row[column] or "-" for column in columns] for row in rows[-last:]]
    show({"ok": True, "runs": rows}, as_json, lambda: tables.table(title, columns, shown))


@app.command("show")
def show_run(run: RunArgument, runs_dir: RunsDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show one run: status, configuration, metrics, expectations."""
    from cvlab.api import catalog
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root

    found = catalog.show(find_run(run, runs_root(runs_dir)))

    def render() -> None:
        tables.show_block("configuration", found["config"])
        tables.show_result(found)

    show(found, as_json, render)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="runs to compare", autocompletion=complete_run)],
    out: Annotated[Path | None, typer.Option(help="write compare.csv, compare.json and compare.png there")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV on stdout")] = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show runs side by side. What differs between them, and their metrics."""
    from cvlab.api import compare as api_compare
    from cvlab.reports import compare as comparing
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root

    root = runs_root(runs_dir)
    labelled = comparing.labels([find_run(run, root) for run in runs])
    comparison = {"ok": True, **comparing.compare(labelled)}
    if out is not None:
        comparison["files"] = api_compare.write_comparison(comparison, labelled, out)
    if as_csv and not as_json:
        print(comparing.to_csv(comparison), end="")
        return
    show(comparison, as_json, lambda: tables.show_comparison(comparison))


@app.command("config")
def show_config(
    config: Annotated[str | None, typer.Argument(help="a configuration", autocompletion=complete_config)] = None,
    overrides: Overrides = None,
    set_: SetOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema that editors complete with")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a configuration fully resolved. Without one, list those that are shipped."""
    from cvlab.api import catalog
    from cvlab.config import json_schema
    from cvlab.config import loading as configs
    from cvlab.reports import tables

    if schema:
        print(json.dumps(json_schema.json_schema(), indent=2))
        return
    if config is None:
        shipped = catalog.shipped()
        rows = [(row["name"], row["shows"]) for row in shipped]
        show({"ok": True, "configs": shipped}, as_json, lambda: tables.table("", ("name", "shows"), rows))
        return
    chosen = configs.load(config, overrides_of(overrides, set_, None, None)).config
    show({"ok": True, "config": chosen.model_dump()}, as_json, lambda: print(chosen.to_yaml(), end=""))


@app.command()
def experiments(as_json: Json = False, debug: Debug = False) -> None:
    """List the kinds of experiment."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    found = catalog.experiment_lines()
    rows = list(found.items())
    show({"ok": True, "experiments": found}, as_json, lambda: tables.table("", ("experiment", "does"), rows))


@models_app.callback()
def models(context: typer.Context, as_json: Json = False, debug: Debug = False) -> None:
    """List the models and their parameters."""
    if context.invoked_subcommand is not None:
        return
    from cvlab.api import catalog
    from cvlab.reports import tables

    found = catalog.model_lines()
    rows = [(row["name"], row["keys"], row["summary"]) for row in found]
    show({"ok": True, "models": found}, as_json, lambda: tables.table("", ("model", "keys", "is"), rows))


@models_app.command("fetch")
def models_fetch(
    name: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or yolov3_tiny")],
    origin: Annotated[Path | None, typer.Option("--from", help="a file you have already")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a model's weights, waiting as long as it takes, or take them from a file."""
    from cvlab.models import weights

    path = weights.fetch(name, origin)
    show({"ok": True, "name": name, "file": str(path)}, as_json, lambda: print(f"{name} is ready: {path}"))


@app.command()
def doctor(
    faults: Annotated[bool, typer.Option("--faults", help="also kill a training on this disk, and resume it")] = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what this machine has. And whether everything works here."""
    from cvlab.api import doctor as examination
    from cvlab.reports import tables

    found = examination.examine(runs_dir, faults)
    rows = [(check["name"], "ok" if check["ok"] else "FAILS", check["found"]) for check in found["checks"]]
    show(found, as_json, lambda: tables.table("", ("check", "", "found"), rows))
    if not found["ok"]:
        raise typer.Exit(1)


@data_app.command("list")
def data_list(as_json: Json = False, debug: Debug = False) -> None:
    """List the data sets, and which are on the disk."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    found = catalog.data_lines()
    rows = [(row["name"], row["state"], row["summary"], row["licence"]) for row in found]
    show({"ok": True, "data": found}, as_json, lambda: tables.table("", ("name", "state", "is", "licence"), rows))


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="a data set")],
    origin: Annotated[Path | None, typer.Option("--from", help="a file or folder you have already")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a data set, waiting as long as it takes, or take it from a file or folder."""
    from cvlab.api import catalog

    found = catalog.fetch(name, origin)
    show(found, as_json, lambda: print(f"{name} is ready in {found['root']}: {found['found']}"))


@data_app.command("check")
def data_check(
    name: Annotated[str | None, typer.Argument(help="a data set; all that are there where none is named")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the data sets on the disk with their checksums."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    found = catalog.check(name)
    shown = found or {"nothing": "no data set is on the disk; see `cvlab data list`"}
    show({"ok": True, "data": found}, as_json, lambda: tables.show_block("", shown))
