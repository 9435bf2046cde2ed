"""The commands about runs on the disk: runs and its subcommands, show, compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cvlab import console
from cvlab.cli.groups import RUNS, RunsGroup
from cvlab.cli.options import DryRun, Output, QueryArgument, RunArgument, RunsArgument, RunsDir, expand_options

app = typer.Typer()
runs_app = typer.Typer(
    help="List, tag and remove runs. The options of the list, such as --sort and --json: `cvlab runs list --help`.",
    cls=RunsGroup,
)
SHOWN = 200  # of the runs that are listed, without --limit


@runs_app.command("list")
@expand_options
def list_runs(
    query: QueryArgument = None,
    sort: Annotated[
        str | None, typer.Option(help="sort by a key; metrics best first, other keys ascending; default: newest last")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="in the opposite order")] = False,
    columns: Annotated[
        str | None, typer.Option(help="keys to print, separated by commas: metrics, dotted keys, tags, age, note ...")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="print N runs: the first if sorted, else the newest; default: 200, all with --json"),
    ] = None,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """List runs, the newest last. This is what `cvlab runs` without a command does."""
    from cvlab.reports import index, tables
    from cvlab.runs.find import runs_root

    keys = tuple(key for key in (columns or "").split(",") if key)
    shown = limit if limit is not None or output.as_json else SHOWN
    rows, count = index.sorted_runs(runs_root(runs_dir), " ".join(query or []), keys, sort, reverse, shown)
    title = f"{len(rows)} of {count} runs; --limit {count} shows all" if count > len(rows) else ""
    output.show({"ok": True, "count": count, "runs": rows}, lambda: tables.table(title, *index.table_rows(rows, keys)))


@runs_app.command("tag")
@expand_options
def tag_runs(
    runs: RunsArgument,
    add: Annotated[list[str] | None, typer.Option("--add", help="a tag to add; may be repeated")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="a tag to remove; may be repeated")] = None,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Tag runs, for example `cvlab runs tag latest --add baseline`."""
    from cvlab.api import runs as api_runs
    from cvlab.runs.find import runs_root

    result = api_runs.tag(runs_root(runs_dir), runs, add or [], remove or [])
    output.show(result, lambda: _show_annotations(result))


@runs_app.command("note")
@expand_options
def note_run(
    run: RunArgument,
    text: Annotated[str, typer.Argument(help="the note, which replaces the one before; empty: none")],
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Write a note about a run."""
    from cvlab.api import runs as api_runs
    from cvlab.runs.find import runs_root

    result = api_runs.note(runs_root(runs_dir), run, text)
    output.show(result, lambda: _show_annotations(result))


@runs_app.command("star")
@expand_options
def star_runs(
    runs: RunsArgument,
    remove: Annotated[bool, typer.Option("--remove", help="remove the star")] = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Star runs, so that `cvlab runs starred=true` lists them."""
    from cvlab.api import runs as api_runs
    from cvlab.runs.find import runs_root

    result = api_runs.star(runs_root(runs_dir), runs, not remove)
    output.show(result, lambda: _show_annotations(result))


@runs_app.command("rm")
@expand_options
def remove_runs(runs: RunsArgument, dry_run: DryRun = False, runs_dir: RunsDir = None, *, output: Output) -> None:
    """Remove runs. A run in progress and a trial of a sweep are never removed."""
    from cvlab.api import runs as api_runs
    from cvlab.runs.find import runs_root

    result = api_runs.remove(runs_root(runs_dir), runs, dry_run)
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{row['run']}: {verb}, {console.format_bytes(row['bytes'])}" for row in result["runs"]]
    lines.append(f"{console.format_bytes(result['bytes'])} {'would be ' if dry_run else ''}freed")
    output.show(result, lambda: console.show("\n".join(lines)))


@runs_app.command("prune")
@expand_options
def prune_runs(
    query: QueryArgument = None, dry_run: DryRun = False, runs_dir: RunsDir = None, *, output: Output
) -> None:
    """Remove checkpoints of runs that have ended, all but the best and the last."""
    from cvlab.api import runs as api_runs
    from cvlab.runs.find import runs_root

    result = api_runs.prune(runs_root(runs_dir), query or [], dry_run)
    lines = [
        f"{row['run']}: skipped: {row['skipped']}"
        if "skipped" in row
        else f"{row['run']}: {', '.join(row['removed'])}, {console.format_bytes(row['bytes'])}"
        for row in result["runs"]
    ]
    lines.append(f"{console.format_bytes(result['bytes'])} {'would be ' if dry_run else ''}freed")
    output.show(result, lambda: console.show("\n".join(lines)))


@runs_app.command("export")
@expand_options
def export_runs(
    runs: Annotated[
        list[str], typer.Argument(help="runs, each by name, path or query, and last the file to write, FILE.zip")
    ],
    without_checkpoints: Annotated[
        bool, typer.Option("--without-checkpoints", help="leave checkpoints out: the runs cannot be resumed from it")
    ] = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Write runs into a zip file for `cvlab runs import`: `cvlab runs export RUN... FILE.zip`."""
    from cvlab.api import runs as api_runs
    from cvlab.errors import ConfigError
    from cvlab.runs.find import runs_root

    *names, file = runs
    if not names or not file.endswith(".zip"):
        raise ConfigError("name the runs, and last the file to write", f"cvlab runs export {runs[0]} FILE.zip")
    result = api_runs.export_archive(runs_root(runs_dir), names, Path(file), not without_checkpoints)
    lines = [f"{row['run']}: {row['files']} files, {console.format_bytes(row['bytes'])}" for row in result["runs"]]
    lines.append(f"{console.relative_path(Path(file))}: {console.format_bytes(result['bytes'])}")
    output.show(result, lambda: console.show("\n".join(lines)))


@runs_app.command("import")
@expand_options
def import_runs(
    file: Annotated[Path, typer.Argument(help="an archive that `cvlab runs export` wrote")],
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Import runs from a zip file. All files are checked; no code in it is run."""
    from cvlab.api import runs as api_runs
    from cvlab.runs.find import runs_root

    result = api_runs.import_archive(runs_root(runs_dir), file)
    lines = [
        f"{row['run']}: {row['files']} files, {console.format_bytes(row['bytes'])}"
        f"{'' if row['has_checkpoints'] else ', without checkpoints'}"
        f"{', with Python files, which --trust runs' if row['has_code'] else ''}"
        for row in result["runs"]
    ]
    output.show(result, lambda: console.show("\n".join(lines)))


def _show_annotations(result: dict[str, Any]) -> None:
    for row in result["runs"]:
        parts = [*(["starred"] if row["starred"] else []), *row["tags"], *([row["note"]] if row["note"] else [])]
        console.show(f"{row['run']}: {', '.join(parts) or 'nothing noted'}")


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
    runs: RunsArgument,
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
    from cvlab.runs import query
    from cvlab.runs.find import runs_root

    paths = reports_compare.labels(query.select(runs, runs_root(runs_dir), query.MAX_SELECTED))
    comparison = {"ok": True, **reports_compare.compare(paths)}
    if out is not None:
        comparison["files"] = api_compare.write_comparison(comparison, paths, out)
    if as_csv and not output.as_json:
        print(reports_compare.to_csv(comparison), end="")
        return
    output.show(comparison, lambda: tables.show_comparison(comparison))
