"""The command doctor."""

from typing import Annotated

import typer

from cvlab.cli.groups import MACHINE
from cvlab.cli.options import Output, RunsDir, expand_options

app = typer.Typer()


@app.command(rich_help_panel=MACHINE)
@expand_options
def doctor(
    faults: Annotated[
        bool, typer.Option("--faults", help="also kill and resume a short training run on this disk")
    ] = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Check this machine's setup."""
    from cvlab.api import doctor as api_doctor
    from cvlab.reports import tables

    result = api_doctor.run_checks(runs_dir, faults)
    rows = [(check["name"], "ok" if check["ok"] else "FAILS", check["detail"]) for check in result["checks"]]
    output.show(result, lambda: tables.table("", ("check", "status", "result"), rows))
    if not result["ok"]:
        raise typer.Exit(1)
