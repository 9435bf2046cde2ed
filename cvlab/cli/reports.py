"""The commands that show runs elsewhere: report, ui, track, export."""

from pathlib import Path
from typing import Annotated

import typer

from cvlab import console
from cvlab.cli.groups import RUNS, TRAIN
from cvlab.cli.options import (
    Output,
    QueryArgument,
    RunArgument,
    RunsArgument,
    RunsDir,
    Trust,
    expand_options,
    require_trust,
)

app = typer.Typer()


@app.command(rich_help_panel=RUNS)
@expand_options
def report(
    runs: RunsArgument,
    out: Annotated[Path | None, typer.Option(help="file to write; default: report.html of the run")] = None,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Write an HTML report on a run, or a comparison of several."""
    from cvlab.reports import compare, html
    from cvlab.runs import query
    from cvlab.runs.find import runs_root
    from cvlab.storage import atomic

    root = runs_root(runs_dir)
    paths = query.select(runs, root, query.MAX_SELECTED)
    if len(paths) == 1:
        file = out or paths[0] / html.FILE
        if out is None:
            html.write_run(paths[0])
        else:
            atomic.write_text(file, html.run_page(paths[0]))
    else:
        file = out or root / html.COMPARISON
        atomic.write_text(file, html.comparison_page(compare.labels(paths), html.links_from(file, root)))
    output.show({"ok": True, "files": [str(file)]}, lambda: console.show(console.relative_path(file)))


@app.command(rich_help_panel=RUNS)
@expand_options
def ui(
    query: QueryArgument = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8123,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Browse runs in a web browser. Serves this machine only, until Ctrl-C."""
    from cvlab.api import serve
    from cvlab.runs.find import runs_root

    root = runs_root(runs_dir)
    serve.serve(
        root,
        port,
        lambda address: console.info(f"{address} shows the runs below {root}; Ctrl-C ends it"),
        " ".join(query or []),
    )


@app.command(rich_help_panel=RUNS)
@expand_options
def track(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="tensorboard, mlflow, wandb (offline) or trackio (local)")],
    follow: Annotated[bool, typer.Option("--follow", help="continue until the run ends")] = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Log a run to TensorBoard, MLflow, wandb or trackio."""
    from cvlab.api import track as api_track
    from cvlab.runs.find import find_run, runs_root

    if follow:
        api_track.yield_cpu()
    command = api_track.log_run(find_run(run, runs_root(runs_dir)), to, follow)
    output.show({"ok": True, "tracker": to, "command": command}, lambda: console.show(command))


@app.command(rich_help_panel=TRAIN)
@expand_options
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="safetensors or onnx")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: export.FORMAT of the run")] = None,
    checkpoint: Annotated[str, typer.Option(help="last or best weights")] = "last",
    trust: Trust = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Export a trained model. The file is read back and compared with the model."""
    from cvlab.api import export as api_export
    from cvlab.experiments.base import Exportable, has_capability
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root

    path = find_run(run, runs_root(runs_dir), has_capability(Exportable), "a training run")
    require_trust(str(path), trust)
    result = api_export.export(path, to, checkpoint, out)
    output.show(result, lambda: tables.show_export(result))
