"""The commands of many runs: sweep and verify."""

from typing import Annotated

import typer

from cvlab.cli.groups import TRAIN
from cvlab.cli.options import (
    ConfigArgument,
    DataOptions,
    DryRun,
    Output,
    Overrides,
    RunOptions,
    Trust,
    complete_config,
    expand_options,
    finish,
    gather_overrides,
    require_trust,
    show_plan,
    show_verdict,
)

app = typer.Typer()
Workers = Annotated[int | None, typer.Option(min=1, max=64, help="number of runs of a sweep at a time")]


@app.command(rich_help_panel=TRAIN)
@expand_options
def sweep(
    config: ConfigArgument,
    overrides: Overrides = None,
    workers: Workers = None,
    on: Annotated[str | None, typer.Option(help="where to run: local, ray or slurm")] = None,
    address: Annotated[str | None, typer.Option(help="address of a Ray cluster: auto or host:port")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start anew even if the same sweep was interrupted")] = False,
    dry_run: DryRun = False,
    trust: Trust = False,
    *,
    options: RunOptions,
    data: DataOptions,
    output: Output,
) -> None:
    """Run a grid or search over configurations.

    Example: `cvlab sweep cifar_bn grid.optimizer.lr=[1e-3,1e-2] seeds=[0,1]`.
    """
    from cvlab.sweeps.executors import local

    if not dry_run and on in (None, "local"):
        local.start_server()  # it loads torch on another core while this process does the same
    from cvlab.api import sweep as api_sweep
    from cvlab.runs.find import runs_root
    from cvlab.sweeps.experiment import load_sweep

    require_trust(config, trust)
    flags = {"workers": workers, "submit.on": on, "submit.address": address}
    loaded = load_sweep(config, gather_overrides(overrides, options, "base.", **flags))
    root = runs_root(options.runs_dir)
    if dry_run:
        show_plan(loaded, root, output)
    else:
        finish(api_sweep.start(loaded, data.policy(), root, fresh), output)


@app.command(rich_help_panel=TRAIN)
@expand_options
def verify(
    configs: Annotated[list[str], typer.Argument(help="configurations to run", autocompletion=complete_config)],
    workers: Workers = None,
    trust: Trust = False,
    *,
    options: RunOptions,
    data: DataOptions,
    output: Output,
) -> None:
    """Run configurations and check their expectations. Exits with code 3 if one fails."""
    from cvlab.api import verify as api_verify
    from cvlab.config import loading
    from cvlab.reports import tables
    from cvlab.runs.find import runs_root
    from cvlab.sweeps.config import SweepConfig

    loaded = []
    for name in configs:
        require_trust(name, trust)
        is_sweep = isinstance(loading.load(name).config, SweepConfig)
        flags = {"workers": workers} if is_sweep else {}
        loaded.append(loading.load(name, gather_overrides(None, options, "base." if is_sweep else "", **flags)))
    result = api_verify.verify(loaded, data.policy(), runs_root(options.runs_dir))
    rows = result["verified"]
    failed = [f"{row['config']}: {row['rule']}" for row in rows if not row["met"]]
    code = api_verify.verdict_code(rows)
    show_verdict(result, output, lambda: tables.show_verification(rows), f"not met: {'; '.join(failed)}", code=code)
