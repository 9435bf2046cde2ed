"""The commands about runs on the disk: runs, show, compare."""

from pathlib import Path
from typing import Annotated

import typer

from cvlab.cli.groups import RUNS
from cvlab.cli.options import Output, RunArgument, RunsDir, complete_run, expand_options

app = typer.Typer()


@app.command("runs", rich_help_panel=RUNS)
@expand_options
def list_runs(
    last: Annotated[int, typer.Option(min=1, help="print the newest N runs; --json has all")] = 200,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """List runs, the newest last."""
    from cvlab.reports import index, tables
    from cvlab.runs.find import runs_root

    rows = index.runs(runs_root(runs_dir))
    columns = ("run", "status", "experiment", "data", "result")
    title = f"the newest {last} of {len(rows)} runs; --last {len(rows)} shows all" if len(rows) > last else ""
    lines = [[row[column] or "-" for column in columns] for row in rows[-last:]]
    output.show({"ok": True, "runs": rows}, lambda: tables.table(title, columns, lines))


@app.command("show", rich_help_panel=RUNS)
@expand_options
def show_run(run: RunArgument, runs_dir: RunsDir = None, *, output: Output) -> None:
    """Show a run: status, configuration, metrics, expectations."""
    from cvlab.api import catalog
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root

    result = catalog.show(find_run(run, runs_root(runs_dir)))

    def render() -> None:
        tables.show_block("configuration", result["config"])
        tables.show_result(result)

    output.show(result, render)


@app.command(rich_help_panel=RUNS)
@expand_options
def compare(
    runs: Annotated[list[str], typer.Argument(help="runs to compare", autocompletion=complete_run)],
    out: Annotated[Path | None, typer.Option(help="write compare.csv, compare.json and compare.png there")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV on stdout")] = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Compare the settings and metrics of runs."""
    from cvlab.api import compare as api_compare
    from cvlab.reports import compare as reports_compare
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root

    root = runs_root(runs_dir)
    paths = reports_compare.labels([find_run(run, root) for run in runs])
    comparison = {"ok": True, **reports_compare.compare(paths)}
    if out is not None:
        comparison["files"] = api_compare.write_comparison(comparison, paths, out)
    if as_csv and not output.as_json:
        print(reports_compare.to_csv(comparison), end="")
        return
    output.show(comparison, lambda: tables.show_comparison(comparison))
