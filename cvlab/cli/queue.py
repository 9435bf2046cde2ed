"""The queue of runs: queue add, list, rm, run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cvlab import console
from cvlab.cli.groups import CommandGroup
from cvlab.cli.options import (
    ConfigArgument,
    DataOptions,
    Output,
    Overrides,
    RunOptions,
    RunsDir,
    Seed,
    Trust,
    expand_options,
    gather_overrides,
    require_trust,
    show_verdict,
)

queue_app = typer.Typer(help="Queue runs and run them later, several at a time.", cls=CommandGroup)


@queue_app.command("add")
@expand_options
def add_item(
    config: ConfigArgument,
    overrides: Overrides = None,
    seed: Seed = None,
    trust: Trust = False,
    *,
    options: RunOptions,
    data: DataOptions,
    output: Output,
) -> None:
    """Append a run of any configuration to the queue. It is checked and copied now; its data are fetched."""
    from cvlab.api import queue as api_queue
    from cvlab.config import loading
    from cvlab.runs.find import runs_root

    require_trust(config, trust)
    loaded = loading.load(config, gather_overrides(overrides, options, seed=seed))
    result = api_queue.add(loaded, data.policy(), runs_root(options.runs_dir))
    text = f"item {result['item']}: {console.relative_path(Path(result['run']))}; `cvlab queue run` runs it"
    output.show(result, lambda: console.show(text))


@queue_app.command("list")
@expand_options
def list_items(runs_dir: RunsDir = None, *, output: Output) -> None:
    """List the items of the queue, in order."""
    from cvlab.api import queue as api_queue
    from cvlab.runs.find import runs_root

    result = api_queue.list_items(runs_root(runs_dir))
    output.show(result, lambda: _show_items(result["items"]))


@queue_app.command("rm")
@expand_options
def remove_items(
    items: Annotated[list[str] | None, typer.Argument(help="numbers of items, or names of their runs")] = None,
    done: Annotated[bool, typer.Option("--done", help="all items that are done")] = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Remove items from the queue. Runs that have started keep their directories."""
    from cvlab.api import queue as api_queue
    from cvlab.errors import ConfigError
    from cvlab.runs.find import runs_root

    if not items and not done:
        raise ConfigError("no item is named", "give numbers of `cvlab queue list`, or --done")
    result = api_queue.remove(runs_root(runs_dir), items or [], done)
    lines = []
    for row in result["items"]:
        verb = "was deleted" if row["deleted"] else "stays"
        lines.append(f"item {row['item']} was removed, {console.relative_path(Path(row['run']))} {verb}")
    output.show(result, lambda: console.show("\n".join(lines) or "no item is done"))


@queue_app.command("run")
@expand_options
def run_items(
    workers: Annotated[int, typer.Option(min=1, max=64, help="number of runs at a time")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="also run items that failed before")] = False,
    trust: Trust = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Run the items of the queue. Interrupted ones are resumed; the exit code is that of the first that failed."""
    from cvlab.sweeps.executors import local

    local.start_server()  # it loads torch on another core while this process does the same
    from cvlab.api import queue as api_queue
    from cvlab.runs.find import runs_root

    result = api_queue.run(runs_root(runs_dir), workers, retry, trust)
    failed = [row for row in result["items"] if row["code"]]
    first: dict[str, Any] = failed[0] if failed else {"item": 0, "error": "", "code": 0}
    reason = first["error"] or "expectations are not met"
    message = f"{len(failed)} of {result['count']} items failed, the first is item {first['item']}: {reason}"
    hint = "`cvlab queue run --retry` runs failed items again, `cvlab queue rm` removes them"
    show_verdict(result, output, lambda: _show_items(result["items"]), message, hint, first["code"])


def _show_items(rows: list[dict[str, Any]]) -> None:
    from cvlab.reports import tables

    if not rows:
        console.show("the queue is empty; `cvlab queue add CONFIG` appends a run")
        return
    lines = [
        (
            str(row["item"]),
            row["status"],
            Path(row["run"]).name,
            " ".join(row["overrides"]),
            row["error"] or row["result"],
        )
        for row in rows
    ]
    tables.table("", ("item", "status", "run", "overrides", "result"), lines)
