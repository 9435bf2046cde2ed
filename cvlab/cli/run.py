"""The commands about one configuration: train (also called run), lr, resume, eval, gradcheck."""

from pathlib import Path
from typing import Annotated

import typer

from cvlab.cli.groups import TRAIN
from cvlab.cli.options import (
    ConfigArgument,
    DataOptions,
    Device,
    DryRun,
    Output,
    Overrides,
    ProcessOptions,
    ResumeArgument,
    RunArgument,
    RunOptions,
    RunsDir,
    Seed,
    Trust,
    expand_options,
    finish,
    gather_overrides,
    print_plan,
    require_trust,
    show_plan,
    show_verdict,
)

app = typer.Typer()


@app.command(
    "run",
    rich_help_panel=TRAIN,
    help="Run a configuration of any experiment. Same as `train`.",
)
@app.command("train", rich_help_panel=TRAIN)
@expand_options
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    trust: Trust = False,
    *,
    options: RunOptions,
    processes: ProcessOptions,
    data: DataOptions,
    output: Output,
) -> None:
    """Train a model. Its metrics, checkpoints and report are written to a new run directory."""
    from cvlab.api import launch
    from cvlab.api import run as api_run
    from cvlab.config import loading
    from cvlab.distributed import launcher, process_group
    from cvlab.runs.find import runs_root

    root, policy = runs_root(options.runs_dir), data.policy()
    require_trust(config, trust)

    def load() -> loading.Loaded:
        return loading.load(config, gather_overrides(overrides, options, seed=seed))

    if dry_run:
        show_plan(load(), root, output)
    elif process_group.world().size > 1:
        size = process_group.world().size

        def create() -> Path:
            return api_run.create_distributed(load(), policy, root, size)

        finish(launch.train(lambda: launch.run_dir_of_launch(create, root)), output)
    elif processes.nproc is not None and processes.nproc > 1:
        path = api_run.create_distributed(load(), policy, root, processes.nproc)
        raise typer.Exit(launcher.run(path, processes.nproc, processes.max_restarts, output.flags()))
    else:
        finish(api_run.start(load(), policy, root), output)


@app.command(rich_help_panel=TRAIN)
@expand_options
def lr(
    config: ConfigArgument,
    overrides: Overrides = None,
    min: Annotated[float | None, typer.Option("--min", help="smallest learning rate; default: 1e-6")] = None,
    max: Annotated[float | None, typer.Option("--max", help="largest learning rate; default: 10")] = None,
    steps: Annotated[int | None, typer.Option(help="number of steps; default: 100")] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    trust: Trust = False,
    *,
    options: RunOptions,
    data: DataOptions,
    output: Output,
) -> None:
    """Suggest a learning rate. It rises while a few steps are trained; the last line is an override to paste."""
    from cvlab.api import run as api_run
    from cvlab.experiments.common.lr_range_test import load_range_test
    from cvlab.runs.find import runs_root

    require_trust(config, trust)
    texts = gather_overrides(overrides, options, seed=seed)
    loaded = load_range_test(config, texts, min=min, max=max, steps=steps)
    root = runs_root(options.runs_dir)
    if dry_run:
        show_plan(loaded, root, output)
    else:
        finish(api_run.start(loaded, data.policy(), root), output)


@app.command(rich_help_panel=TRAIN)
@expand_options
def resume(
    run: ResumeArgument = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, for example duration.epochs=20: continue the run in a new run directory"),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="continue although the data or your own code was changed")
    ] = False,
    dry_run: DryRun = False,
    trust: Trust = False,
    runs_dir: RunsDir = None,
    *,
    processes: ProcessOptions,
    output: Output,
) -> None:
    """Resume an interrupted run, bit for bit. With key=value, continue a run with other settings in a new directory."""
    from cvlab.api import extend, launch
    from cvlab.api import run as api_run
    from cvlab.distributed import launcher, process_group
    from cvlab.runs.find import find_interrupted_run, find_run, runs_root

    root = runs_root(runs_dir)
    extend.require_run_first(run)
    path = find_run(run, root) if run is not None else find_interrupted_run(root)
    require_trust(str(path), trust or allow_changes)  # also of code that the user has changed since
    count = launch.require_processes(path, processes.nproc)
    if dry_run:
        print_plan(extend.plan(path, overrides or [], root), output)
        return
    is_distributed = process_group.world().size > 1

    def run_to_resume() -> Path:
        return extend.create(extend.prepare(path, overrides), root, count) if overrides else path

    if is_distributed and overrides:
        finish(launch.train(lambda: launch.run_dir_of_launch(run_to_resume, root), allow_changes), output)
    elif is_distributed:
        finish(launch.train(run_to_resume, allow_changes), output)
    elif count > 1 and (overrides or not api_run.has_ended(path)):
        flags = (*output.flags(), *(("--allow-changes",) if allow_changes else ()), *(("--trust",) if trust else ()))
        raise typer.Exit(launcher.run(run_to_resume(), count, processes.max_restarts, flags))
    else:
        finish(api_run.resume(run_to_resume(), allow_changes=allow_changes), output)


@app.command("eval", rich_help_panel=TRAIN)
@expand_options
def evaluate(
    run: RunArgument,
    split: Annotated[list[str] | None, typer.Option(help="train, val or test; may be repeated")] = None,
    checkpoint: Annotated[str, typer.Option(help="last or best weights")] = "last",
    data: Annotated[str | None, typer.Option(help="another data set: folder:PATH, or a name; classifiers only")] = None,
    device: Device = None,
    trust: Trust = False,
    runs_dir: RunsDir = None,
    *,
    output: Output,
) -> None:
    """Evaluate a run's weights on validation, test or other data."""
    from cvlab.api import evaluate as api_evaluate
    from cvlab.experiments.base import Evaluable, has_capability
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root
    from cvlab.runs.records import read_summary

    path = find_run(run, runs_root(runs_dir), has_capability(Evaluable), "a training run")
    require_trust(str(path), trust)
    result = api_evaluate.evaluate(path, tuple(split or ()), checkpoint, device, data)
    title = f"{path.name}, {checkpoint} weights, step {result['step']}{f', {data}' if data else ''}"
    output.show(
        result, lambda: tables.show_metrics(title, result["metrics"], read_summary(path).get("metric_info", {}))
    )


@app.command(rich_help_panel=TRAIN)
@expand_options
def gradcheck(
    layers: Annotated[list[str] | None, typer.Argument(help="names of layers or models, or ./file.py:Name")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed of the random inputs")] = 0,
    *,
    output: Output,
) -> None:
    """Check the gradients of hand-written layers. Compares them with finite differences and autograd in float64."""
    from cvlab.api import gradcheck as api_gradcheck
    from cvlab.reports import tables

    result = api_gradcheck.run(layers or [], seed)
    wrong = [check["name"] for check in result["checks"] if not check["ok"]]
    show_verdict(result, output, lambda: tables.show_gradients(result["checks"]), f"wrong: {', '.join(wrong)}")
