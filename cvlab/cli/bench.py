"""The command bench: measure this machine and the training runs on it."""

from typing import Annotated

import typer

from cvlab.cli.groups import CommandGroup
from cvlab.cli.options import Device, Output, Overrides, complete_config, expand_options

app = typer.Typer(
    help="Measure the speed of this machine and of training on it.", cls=CommandGroup, invoke_without_command=True
)
Rounds = Annotated[int, typer.Option(min=1, max=1000, help="measurements of each, taken in turns")]
Training = Annotated[str, typer.Argument(help="configuration of a training run", autocompletion=complete_config)]


@app.callback()
@expand_options
def bench(context: typer.Context, rounds: Rounds = 9, device: Device = None, *, output: Output) -> None:
    """Measure the machine's rates, and the images/s of every shipped training run as a share of them."""
    if context.invoked_subcommand is not None:
        return
    from cvlab.bench import training
    from cvlab.reports import tables

    result = training.everything(rounds, device or "auto")

    def render() -> None:
        rates = result["machine"]
        products, convolutions = rates["product_gflops"].items(), rates["convolution_gflops"].items()
        lines = {f"matrix products, {name}": f"{rate:.0f} GFLOP/s" for name, rate in products}
        lines |= {f"convolutions, {name}": f"{rate:.0f} GFLOP/s" for name, rate in convolutions}
        tables.show_block(rates["about"], lines | {"copies": f"{rates['copy_gb_per_second']:.1f} GB/s"})
        keys = ("config", "images_per_second", "mflop_per_image", "gflop_per_second", "share")
        columns = ("configuration", "images/s", "MFLOP/image", "GFLOP/s", "share of convolutions")
        tables.table("training, on noise", columns, [[row[key] for key in keys] for row in result["configs"]])

    output.show(result, render)


@app.command("engine")
@expand_options
def bench_engine(
    config: Training = "cifar_vgg_half_60s",
    rounds: Rounds = 5,
    steps: Annotated[int, typer.Option(min=1, help="steps per measurement")] = 10,
    device: Device = None,
    *,
    output: Output,
) -> None:
    """Compare `fit` with a bare training loop of the same model in the same process."""
    from cvlab.bench import training
    from cvlab.reports import tables

    result = training.engine(rounds, steps, device or "auto", config)
    rows = [(row["loop"], row["images_per_second"], row["against_bare"]) for row in result["loops"]]
    columns = ("loop", "images/s (median)", "time relative to bare")
    output.show(result, lambda: tables.table(result["what"], columns, rows))


@app.command("profile")
@expand_options
def bench_profile(
    config: Training = "cifar_vgg_half_60s",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="number of steps to profile")] = 10,
    device: Device = None,
    *,
    output: Output,
) -> None:
    """Show where training spends its time: convolution, normalization, data, optimizer."""
    from cvlab.bench import profiler
    from cvlab.reports import tables

    result = profiler.shares(config, steps, device or "auto")
    rows = [(kind, f"{share:.1%}") for kind, share in result["shares"].items()]
    output.show(result, lambda: tables.table(result["what"], ("time spent on", "share"), rows))


@app.command("processes")
@expand_options
def bench_processes(
    config: Training = "cifar_vgg_half_60s",
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=2, max=64, help="number of processes, one thread each")] = 2,
    rounds: Rounds = 3,
    steps: Annotated[int, typer.Option(min=1, help="steps per measurement")] = 60,
    *,
    output: Output,
) -> None:
    """Compare training in one process with several, and predict the speedup of more."""
    from cvlab.bench import processes
    from cvlab.reports import tables

    result = processes.run(config, overrides or [], nproc, rounds, steps)

    def render() -> None:
        rates = {f"{size} processes": f"{rate:,.0f} images/s" for size, rate in result["images_per_second"].items()}
        latency = f"{1e6 * result['latency_seconds']:.0f} us at least"
        costs = {
            "speedup": f"{result['speedup']:.2f}",
            "step of one process": f"{1000 * result['step_seconds']:.1f} ms",
            "gradients": f"{result['gradient_bytes'] / 1e6:.2f} MB",
            "exchange": f"{result['bytes_per_second'] / 1e9:.2f} GB/s, {latency}",
        }
        predicted = {f"predicted for {n}": f"speedup {value:.2f}" for n, value in result["predicted"].items()}
        tables.show_block(result["what"], rates | costs | predicted)

    output.show(result, render)
