"""The commands that show runs elsewhere: as pages, in trackers."""

from pathlib import Path
from typing import Annotated

import typer

from cvlab import console
from cvlab.cli.options import Debug, Json, RunArgument, RunsDir, complete_run, show

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="runs; several are compared", autocompletion=complete_run)],
    out: Annotated[Path | None, typer.Option(help="the page to write; else report.html of the run")] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a page about a run, or one that compares several."""
    from cvlab.reports import compare, html
    from cvlab.runs.find import find_run, runs_root
    from cvlab.storage import atomic

    root = runs_root(runs_dir)
    found = [find_run(run, root) for run in runs]
    if len(found) == 1:
        path = out or found[0] / html.FILE
        text = html.run_page(found[0], home=f"../{html.INDEX}" if out is None else None)
    else:
        path = out or root / html.COMPARISON
        text = html.comparison_page(compare.labels(found))
    atomic.write_text(path, text)
    show({"ok": True, "files": [str(path)]}, as_json, lambda: print(path))


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8123,
    runs_dir: RunsDir = None,
    debug: Debug = False,
) -> None:
    """Show all runs in a browser. On this machine only, also while they go on, until Ctrl-C."""
    from cvlab.api import serve
    from cvlab.runs.find import runs_root

    root = runs_root(runs_dir)
    serve.serve(root, port, lambda address: console.info(f"{address} shows the runs below {root}; Ctrl-C ends it"))


@app.command()
def track(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="tensorboard, mlflow or wandb (offline)")],
    follow: Annotated[bool, typer.Option("--follow", help="go on until the run ends")] = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell a tracker about a run. Configuration and metrics; afterwards, or while it goes on."""
    from cvlab.api import track as api_track
    from cvlab.runs.find import find_run, runs_root

    look = api_track.tell(find_run(run, runs_root(runs_dir)), to, follow)
    show({"ok": True, "tracker": to, "look": look}, as_json, lambda: print(look))


@app.command()
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="safetensors or onnx")],
    out: Annotated[Path | None, typer.Option(help="the file to write; else export.FORMAT of the run")] = None,
    checkpoint: Annotated[str, typer.Option(help="last or best weights")] = "last",
    runs_dir: RunsDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run's net for other programs. The file is read again and compared before it counts."""
    from cvlab.api import export as api_export
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root

    found = api_export.export(find_run(run, runs_root(runs_dir)), to, checkpoint, out)
    show(found, as_json, lambda: tables.show_block("", {key: value for key, value in found.items() if key != "ok"}))
