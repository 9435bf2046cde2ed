"""`cvlab bench`: measure this machine, the engine, the layers."""

from typing import Annotated

import typer

from cvlab.cli.options import Debug, Device, Json, Overrides, complete_config, show

app = typer.Typer(help="Measure this machine and the trainings on it.", invoke_without_command=True)
Rounds = Annotated[int, typer.Option(min=1, max=1000, help="measurements of each, alternating")]
Training = Annotated[str, typer.Argument(help="a configuration of a training", autocompletion=complete_config)]


@app.callback()
def bench(
    context: typer.Context,
    rounds: Rounds = 9,
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the machine's rates, and images/s of every shipped training as a share of them."""
    if context.invoked_subcommand is not None:
        return
    from cvlab.bench import training
    from cvlab.reports import tables

    found = training.everything(rounds, device or "auto")

    def render() -> None:
        rates = found["machine"]
        lines = {f"products, {name}": f"{rate:.0f} GFLOP/s" for name, rate in rates["product_gflops"].items()}
        named = rates["convolution_gflops"].items()
        lines |= {f"convolutions, {name}": f"{rate:.0f} GFLOP/s" for name, rate in named}
        tables.show_block(rates["about"], lines | {"copies": f"{rates['copy_gb_per_second']:.1f} GB/s"})
        keys = ("config", "images_per_second", "mflop_per_image", "gflop_per_second", "share")
        columns = ("configuration", "images/s", "MFLOP/image", "GFLOP/s", "share of convolutions")
        tables.table("trainings, on noise", columns, [[row[key] for key in keys] for row in found["configs"]])

    show(found, as_json, render)


@app.command("engine")
def bench_engine(
    config: Training = "cifar_vgg_half_60s",
    rounds: Rounds = 5,
    steps: Annotated[int, typer.Option(min=1, help="steps per measurement")] = 10,
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare `fit` with a bare training loop of the same net in the same process."""
    from cvlab.bench import training
    from cvlab.reports import tables

    found = training.engine(rounds, steps, device or "auto", config)
    rows = [(row["loop"], row["images_per_second"], row["against_bare"]) for row in found["loops"]]
    columns = ("loop", "images/s (median)", "time against bare")
    show(found, as_json, lambda: tables.table(found["what"], columns, rows))


@app.command("profile")
def bench_profile(
    config: Training = "cifar_vgg_half_60s",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="how many are profiled")] = 10,
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where the time of a training goes: convolution, normalisation, data, optimizer."""
    from cvlab.bench import profiler
    from cvlab.reports import tables

    found = profiler.shares(config, steps, device or "auto")
    rows = [(kind, f"{share:.1%}") for kind, share in found["shares"].items()]
    show(found, as_json, lambda: tables.table(found["what"], ("time spent on", "share"), rows))


@app.command("layers")
def bench_layers(
    rounds: Rounds = 15,
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the hand-written layers with torch's, on the shapes of the net of 60 seconds."""
    from cvlab.bench import layers
    from cvlab.reports import tables

    found = layers.layers(rounds, device or "auto")
    columns = ("layer", "input", "torch, ms", "manual / torch", "manual_alt / torch")
    rows = [
        (
            row["layer"],
            row["input"],
            1000 * row["torch_seconds"],
            row["manual_against_torch"],
            row["manual_alt_against_torch"],
        )
        for row in found["layers"]
    ]
    show(found, as_json, lambda: tables.table(found["what"], columns, rows))


@app.command("photos")
def bench_photos(
    rounds: Rounds = 9,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="photos that go through together")] = 8,
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare saliency and attack with bare loops of the same net, and with captum where it is installed."""
    from cvlab.bench import photos
    from cvlab.reports import tables

    found = photos.run(rounds, device or "auto", batch_size)
    rows = [(row["loop"], row["seconds"], row["times_as_fast"]) for row in found["loops"]]
    columns = ("loop", "seconds per step (median)", "times as fast as bare")
    show(found, as_json, lambda: tables.table(found["what"], columns, rows))


@app.command("boxes")
def bench_boxes(
    rounds: Rounds = 9,
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what detectors are made of, and the detectors that come along on a photo."""
    from cvlab.bench import detection
    from cvlab.reports import tables

    found = detection.run(rounds, device or "auto")
    rows = [(row["loop"], 1000 * row["seconds"], row["against_ours"]) for row in found["loops"]]
    columns = ("", "ms (median)", "time against ours")
    show(found, as_json, lambda: tables.table(found["what"], columns, rows))


@app.command("processes")
def bench_processes(
    config: Training = "cifar_vgg_half_60s",
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=2, max=64, help="processes, a thread each")] = 2,
    rounds: Rounds = 3,
    steps: Annotated[int, typer.Option(min=1, help="steps per measurement")] = 60,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a training in one process with one in several; predict it for more."""
    from cvlab.bench import processes
    from cvlab.reports import tables

    found = processes.run(config, overrides or [], nproc, rounds, steps)

    def render() -> None:
        rates = {f"{size} processes": f"{rate:,.0f} images/s" for size, rate in found["images_per_second"].items()}
        costs = {
            "times as fast": f"{found['speedup']:.2f}",
            "step of one process": f"{1000 * found['step_seconds']:.1f} ms",
            "gradients": f"{found['gradient_bytes'] / 1e6:.2f} MB",
            "exchange": f"{found['bytes_per_second'] / 1e9:.2f} GB/s, {1e6 * found['latency_seconds']:.0f} us at least",
        }
        guesses = {f"predicted for {n}": f"{value:.2f} times as fast" for n, value in found["predicted"].items()}
        tables.show_block(found["what"], rates | costs | guesses)

    show(found, as_json, render)
