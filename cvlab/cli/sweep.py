"""The commands of many runs: sweep and verify."""

from typing import Annotated

import typer

from cvlab import console
from cvlab.cli.options import (
    ConfigArgument,
    Debug,
    Device,
    Download,
    DryRun,
    Json,
    NoFallback,
    Offline,
    Overrides,
    Quiet,
    RunsDir,
    SetOption,
    Verbose,
    complete_config,
    finish,
    show_plan,
    show_verdict,
)

app = typer.Typer()


@app.command()
def sweep(
    config: ConfigArgument,
    overrides: Overrides = None,
    set_: SetOption = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="arms at a time")] = None,
    on: Annotated[str | None, typer.Option(help="where arms run: local, ray or slurm")] = None,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster: auto or host:port")] = None,
    device: Device = None,
    runs_dir: RunsDir = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start anew although one like it has not ended")] = False,
    dry_run: DryRun = False,
    no_fallback: NoFallback = False,
    offline: Offline = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run a sweep, or a configuration with axes. `cvlab sweep cifar_bn grid.optimizer.lr=[1e-3,1e-2] seeds=[0,1]`."""
    console.set_level(quiet, verbose)
    from cvlab.sweeps.executors import local

    if not dry_run and on in (None, "local"):
        local.start_server()  # it loads torch on another core while this process does the same
    from cvlab.api import sweep as api_sweep
    from cvlab.data.resolve import DownloadPolicy
    from cvlab.runs.find import runs_root
    from cvlab.sweeps.experiment import load_sweep

    given = {"workers": workers, "submit.on": on, "submit.address": address}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    flags += [f"base.device={device}"] if device is not None else []
    loaded = load_sweep(config, [*(overrides or []), *(set_ or []), *flags])
    root = runs_root(runs_dir)
    if dry_run:
        show_plan(loaded, root, as_json)
        return
    finish(api_sweep.start(loaded, DownloadPolicy(offline, download, no_fallback), root, fresh), as_json)


@app.command()
def verify(
    configs: Annotated[list[str], typer.Argument(help="configurations to run", autocompletion=complete_config)],
    set_: SetOption = None,
    device: Device = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="arms of a sweep at a time")] = None,
    runs_dir: RunsDir = None,
    no_fallback: NoFallback = False,
    offline: Offline = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run configurations, expected against measured. Exit code 3 where one misses."""
    console.set_level(quiet, verbose)
    from cvlab.api import verify as api_verify
    from cvlab.config import loading
    from cvlab.data.resolve import DownloadPolicy
    from cvlab.reports import tables
    from cvlab.runs.find import runs_root
    from cvlab.sweeps.config import SweepConfig

    loaded = []
    for name in configs:
        is_sweep = isinstance(loading.load(name).config, SweepConfig)
        flags = [f"{'base.' if is_sweep else ''}device={device}"] if device is not None else []
        flags += [f"workers={workers}"] if is_sweep and workers is not None else []
        loaded.append(loading.load(name, [*(set_ or []), *flags]))
    found = api_verify.verify(loaded, DownloadPolicy(offline, download, no_fallback), runs_root(runs_dir))
    rows = found["verified"]
    missed = [f"{row['config']}: {row['rule']}" for row in rows if not row["met"]]
    code = api_verify.verdict_code(rows)
    show_verdict(found, as_json, lambda: tables.show_verification(rows), f"not met: {'; '.join(missed)}", code=code)
