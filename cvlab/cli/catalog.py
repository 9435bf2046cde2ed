"""The commands that list what there is: config, summary, experiments, models, data."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cvlab import console
from cvlab.cli.groups import PHOTOS, RESOURCES, CommandGroup
from cvlab.cli.options import (
    ConfigArgument,
    DataOptions,
    ModelOptions,
    Output,
    Overrides,
    RunOptions,
    RunsDir,
    SetOption,
    Trust,
    complete_config,
    expand_options,
    gather_overrides,
    require_trust,
)
from cvlab.errors import ConfigError

app = typer.Typer()
models_app = typer.Typer(help="List models, download weights.", cls=CommandGroup)
data_app = typer.Typer(help="List, download and check data sets.", cls=CommandGroup)


@app.command("config", rich_help_panel=RESOURCES)
@expand_options
def show_config(
    config: Annotated[str | None, typer.Argument(help="a configuration", autocompletion=complete_config)] = None,
    overrides: Overrides = None,
    set_: SetOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema for completion in editors")] = False,
    trust: Trust = False,
    *,
    output: Output,
) -> None:
    """List configurations, or print one with all defaults."""
    if schema:
        from cvlab.config import json_schema

        console.document(json.dumps(json_schema.json_schema(), indent=2))
        return
    if config is None:
        from cvlab.api import catalog
        from cvlab.reports import tables

        shipped = catalog.shipped()
        rows = [(row["name"], row["shows"]) for row in shipped]
        output.show({"ok": True, "configs": shipped}, lambda: tables.table("", ("name", "shows"), rows))
        return
    from cvlab.config import loading

    require_trust(config, trust)
    loaded = loading.load(config, gather_overrides(overrides, RunOptions(set_))).config
    output.show({"ok": True, "config": loaded.model_dump()}, lambda: console.show(loaded.to_yaml(), end=""))


@app.command(rich_help_panel=RESOURCES)
@expand_options
def summary(
    config: Annotated[str, typer.Argument(help="a configuration or a run", autocompletion=complete_config)],
    overrides: Overrides = None,
    set_: SetOption = None,
    trust: Trust = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Print a model's layers: shapes, parameters, FLOPs, memory."""
    from cvlab.api import summary as api_summary
    from cvlab.config import loading
    from cvlab.reports import tables
    from cvlab.runs.find import runs_root

    source = api_summary.source_of(config, runs_root(runs_dir))
    require_trust(source, trust)
    result = api_summary.summarize(loading.load(source, gather_overrides(overrides, RunOptions(set_))))
    output.show(result, lambda: tables.show_summary(result))


@app.command(rich_help_panel=RESOURCES)
@expand_options
def experiments(*, output: Output) -> None:
    """List the experiments."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    lines = catalog.experiment_lines()
    rows = list(lines.items())
    output.show({"ok": True, "experiments": lines}, lambda: tables.table("", ("experiment", "description"), rows))


@models_app.command("list")
@expand_options
def models_list(*, output: Output) -> None:
    """List models and their configuration keys."""
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
    """Download the weights of a model, or copy them from a file."""
    from cvlab.models import weights

    path = weights.fetch(name, origin)
    output.show({"ok": True, "name": name, "file": str(path)}, lambda: console.show(f"{name} is ready: {path}"))


@data_app.command("list")
@expand_options
def data_list(*, output: Output) -> None:
    """List data sets, and which of them are on the disk."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    lines = catalog.data_lines()
    rows = [(row["name"], row["state"], row["summary"], row["license"]) for row in lines]
    columns = ("name", "state", "description", "license")
    output.show({"ok": True, "data": lines}, lambda: tables.table("", columns, rows))


@data_app.command("show")
@expand_options
def data_show(
    config: ConfigArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: data-NAME")] = None,
    samples: Annotated[int, typer.Option(min=1, max=200, help="number of training images to show")] = 16,
    trust: Trust = False,
    *,
    options: RunOptions,
    data: DataOptions,
    output: Output,
) -> None:
    """Show a data set before training: samples, augmentation, classes, sizes, copies of images."""
    from cvlab.api import data_overview
    from cvlab.config import loading
    from cvlab.reports import tables

    require_trust(config, trust)
    loaded = loading.load(config, gather_overrides(overrides, options))
    result = data_overview.show(loaded, data.policy(), out, samples)
    output.show(result, lambda: tables.show_data(result))


@app.command(rich_help_panel=PHOTOS)
@expand_options
def embed(
    images: Annotated[list[str], typer.Argument(help="photos, folders or patterns")],
    out: Annotated[Path | None, typer.Option(help=".npz file to write: `features` and `files`")] = None,
    nearest: Annotated[str | None, typer.Option(help="a photo whose nearest photos are listed")] = None,
    top: Annotated[int, typer.Option(min=1, help="with --nearest: how many")] = 5,
    *,
    model: ModelOptions,
    options: RunOptions,
    output: Output,
) -> None:
    """Compute features of images, and find similar ones. Example: `cvlab embed photos --nearest photo.jpg`."""
    from cvlab.api import data_overview
    from cvlab.models.names import DEFAULT_MODEL
    from cvlab.reports import tables

    if out is None and nearest is None:
        raise ConfigError("nothing to do", "--out FILE.npz writes the features, --nearest PHOTO lists similar photos")
    values = model.values(options)
    result = data_overview.embed(images, values["model"] or DEFAULT_MODEL, values["weights"], out, nearest, top)
    output.show(result, lambda: tables.show_embedding(result))


@data_app.command("fetch")
@expand_options
def data_fetch(
    name: Annotated[str, typer.Argument(help="a data set")],
    origin: Annotated[Path | None, typer.Option("--from", help="a local file or folder to take the data from")] = None,
    *,
    output: Output,
) -> None:
    """Download a data set, or copy it from a file or folder."""
    from cvlab.api import catalog

    result = catalog.fetch(name, origin)
    output.show(result, lambda: console.show(f"{name} is ready in {result['root']}: {result['detail']}"))


@data_app.command("check")
@expand_options
def data_check(
    name: Annotated[str | None, typer.Argument(help="a data set; default: all that are on the disk")] = None,
    *,
    output: Output,
) -> None:
    """Verify the checksums of data sets on the disk."""
    from cvlab.api import catalog
    from cvlab.reports import tables

    result = catalog.check(name)
    block = result or {"nothing": "no data set is on the disk; see `cvlab data list`"}
    output.show({"ok": True, "data": result}, lambda: tables.show_block("", block))
