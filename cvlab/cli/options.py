"""What the commands share: their options and how a result is printed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cvlab import console
from cvlab.errors import DataError, ExpectationError
from cvlab.runs.records import plain
from cvlab.runs.results import read_errors

if TYPE_CHECKING:
    from cvlab.config.loading import Loaded


def complete_config(incomplete: str) -> list[str]:
    """Complete the name of a shipped configuration."""
    from cvlab.config import loading

    return [name for name in loading.shipped_names() if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Complete the name of a run."""
    from cvlab.runs.find import list_runs, runs_root

    names = ["latest", *(path.name for path in list_runs(runs_root()))]
    return [name for name in names if name.startswith(incomplete)]


ConfigArgument = Annotated[
    str, typer.Argument(help="a YAML file, or the name of a shipped configuration", autocompletion=complete_config)
]
RunArgument = Annotated[
    str, typer.Argument(help="a run directory, `latest`, or part of a run's name", autocompletion=complete_run)
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example optimizer.lr=1e-2")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="the same as key=value")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
Seed = Annotated[int | None, typer.Option(help="of initialisation, data order and augmentation")]
Processes = Annotated[
    int | None, typer.Option("--nproc", min=1, max=1024, help="train in so many processes, which share each batch")
]
Restarts = Annotated[int, typer.Option(min=0, help="with --nproc: start again so often where a process is killed")]
RunsDir = Annotated[str | None, typer.Option(help="where runs go; else $CVLAB_RUNS, else ./runs")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="show warnings and errors only")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="show more")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show what would be done; write nothing")]
NoFallback = Annotated[
    bool, typer.Option("--no-fallback", help="exit with an error instead of using the fallback data set")
]
Offline = Annotated[bool, typer.Option("--offline", help="open no socket; $CVLAB_OFFLINE=1 does the same")]
Download = Annotated[bool, typer.Option("--download", help="wait for a download, however long it takes")]


def show(result: Mapping[str, Any], as_json: bool, render: Callable[[], None]) -> None:
    """Print one JSON document, or what `render` prints for people."""
    if as_json:
        print(json.dumps(plain(result), indent=2))
    else:
        render()


def overrides_of(texts: list[str] | None, more: list[str] | None, device: str | None, seed: int | None) -> list[str]:
    """Gather the overrides of a command line, the last one wins."""
    flags = {"device": device, "seed": seed}
    return [*(texts or []), *(more or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]


def show_verdict(
    document: dict[str, Any],
    as_json: bool,
    render: Callable[[], None],
    wrong: str,
    hint: str = "",
    code: int = ExpectationError.code,
) -> None:
    """Print a result; exit code 3, or `code`, with the line `wrong`, where its `ok` is false."""
    error = ExpectationError(wrong, hint)
    error.code = code
    show(document if document["ok"] else document | {"error": error.document()}, as_json, render)
    if not document["ok"]:
        console.info(f"error: {error}")
        raise typer.Exit(error.code)


def show_plan(loaded: "Loaded", root: Path, as_json: bool) -> None:
    """Print what a run would do."""
    from cvlab.api import run
    from cvlab.reports import tables

    plan = run.plan(loaded, root)
    show(plan, as_json, lambda: tables.show_block("plan; nothing was written", plan))


def flags_of(as_json: bool, quiet: bool, verbose: bool, debug: bool) -> tuple[str, ...]:
    """Return the flags that say how a command speaks, for a command that is called in its place."""
    given = {"--json": as_json, "--quiet": quiet, "--verbose": verbose, "--debug": debug}
    return tuple(flag for flag, is_given in given.items() if is_given)


def finish_main(result: dict[str, Any], as_json: bool) -> None:
    """Print a run's result in the one of several processes that has it."""
    if result:
        finish(result, as_json)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print a run's result; exit code 4 for photos that could not be read, 3 for an expectation that was not met."""
    from cvlab.reports import tables

    missed = [verdict["rule"] for verdict in result["expect"] if not verdict["met"]]
    rows = result.get("results", [])
    unread = read_errors(rows)
    wrong = f"{len(unread)} of {len(rows)} photos could not be read: {unread[0]}" if unread else ""
    wrong = wrong or f"not met: {'; '.join(missed)}"
    document = result | {"ok": result["ok"] and not unread}
    code = DataError.code if unread else ExpectationError.code
    show_verdict(document, as_json, lambda: tables.show_result(result), wrong, f"see {result['run']}", code)
