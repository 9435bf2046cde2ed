"""The commands that list what there is: config, experiments, models, data."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cvlab.cli.options import (
    Output,
    Overrides,
    RunOptions,
    SetOption,
    complete_config,
    expand_options,
    gather_overrides,
)

app = typer.Typer()
models_app = typer.Typer(help="List models, fetch weights.", invoke_without_command=True)
data_app = typer.Typer(help="List, fetch and check data sets.", no_args_is_help=True)


@app.command("config")
@expand_options
def show_config(
    config: Annotated[str | None, typer.Argument(help="a configuration", autocompletion=complete_config)] = None,
    overrides: Overrides = None,
    set_: SetOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema for completion in editors")] = False,
    *,
    output: Output,
) -> None:
    """Print a resolved configuration, or list the shipped ones."""
    from cvlab.api import catalog
    from cvlab.config import json_schema, loading
    from cvlab.reports import tables

    if schema:
        print(json.dumps(json_schema.json_schema(), indent=2))
        return
    if config is None:
        shipped = catalog.shipped()
        rows = [(row["name"], row["shows"]) for row in shipped]
        output.show({"ok": True, "configs": shipped}, lambda: tables.table("", ("name", "shows"), rows))
        return
    loaded = loading.load(config, gather_overrides(overrides, RunOptions(set_))).config
    output.show({"ok": True, "config": loaded.model_dump()}, lambda: print(loaded.to_yaml(), end=""))


@app.command()
@expand_options
def experiments(*, output: Output) -> None:
    """List the kinds of experiment."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    lines = catalog.experiment_lines()
    rows = list(lines.items())
    output.show({"ok": True, "experiments": lines}, lambda: tables.table("", ("experiment", "description"), rows))


@models_app.callback()
@expand_options
def models(context: typer.Context, *, output: Output) -> None:
    """List the models and their parameters."""
    if context.invoked_subcommand is not None:
        return
    from cvlab.api import catalog
    from cvlab.reports import tables

    lines = catalog.model_lines()
    rows = [(row["name"], row["keys"], row["summary"]) for row in lines]
    output.show({"ok": True, "models": lines}, lambda: tables.table("", ("model", "keys", "description"), rows))


@models_app.command("fetch")
@expand_options
def models_fetch(
    name: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or yolov3_tiny")],
    origin: Annotated[Path | None, typer.Option("--from", help="a local file to take the weights from")] = None,
    *,
    output: Output,
) -> None:
    """Download a model's weights, or take them from a file."""
    from cvlab.models import weights

    path = weights.fetch(name, origin)
    output.show({"ok": True, "name": name, "file": str(path)}, lambda: print(f"{name} is ready: {path}"))


@data_app.command("list")
@expand_options
def data_list(*, output: Output) -> None:
    """List the data sets, and which are on the disk."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    lines = catalog.data_lines()
    rows = [(row["name"], row["state"], row["summary"], row["license"]) for row in lines]
    columns = ("name", "state", "description", "license")
    output.show({"ok": True, "data": lines}, lambda: tables.table("", columns, rows))


@data_app.command("fetch")
@expand_options
def data_fetch(
    name: Annotated[str, typer.Argument(help="a data set")],
    origin: Annotated[Path | None, typer.Option("--from", help="a local file or folder to take the data from")] = None,
    *,
    output: Output,
) -> None:
    """Download a data set, or take it from a file or folder."""
    from cvlab.api import catalog

    result = catalog.fetch(name, origin)
    output.show(result, lambda: print(f"{name} is ready in {result['root']}: {result['found']}"))


@data_app.command("check")
@expand_options
def data_check(
    name: Annotated[str | None, typer.Argument(help="a data set; default: all that are on the disk")] = None,
    *,
    output: Output,
) -> None:
    """Compare the data sets on the disk with their checksums."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    result = catalog.check(name)
    block = result or {"nothing": "no data set is on the disk; see `cvlab data list`"}
    output.show({"ok": True, "data": result}, lambda: tables.show_block("", block))
