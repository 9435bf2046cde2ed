"""The command bench: measure this machine and the training runs on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cvlab import console
from cvlab.cli.groups import BenchGroup
from cvlab.cli.options import Device, Output, Overrides, complete_config, expand_options
from cvlab.errors import ConfigError

app = typer.Typer(help="Measure the speed of this machine and of training on it.", cls=BenchGroup)
Rounds = Annotated[int, typer.Option(min=1, max=1000, help="measurements of each, taken in turns")]
Training = Annotated[str, typer.Argument(help="configuration of a training run", autocompletion=complete_config)]
Result = Annotated[Path, typer.Argument(help="file that `cvlab bench --out FILE` has written")]


@app.command("steps")
@expand_options
def bench_steps(
    configs: Annotated[
        list[str] | None,
        typer.Argument(help="configurations that train; default: all shipped ones", autocompletion=complete_config),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="time for the whole table; configurations that are named are all measured")
    ] = 150,
    rounds: Rounds = 9,
    out: Annotated[
        Path | None, typer.Option(help="also write the result as JSON to this file, for `cvlab bench compare`")
    ] = None,
    device: Device = None,
    *,
    output: Output,
) -> None:
    """Measure the time of a training step against the lower bound of this machine; the default command.

    The data is generated: no data set is needed.
    """
    from cvlab.bench import steps
    from cvlab.reports import tables
    from cvlab.runs.records import to_json_value
    from cvlab.storage import atomic

    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: no folder {out.parent}", "create it, or name another file")
    result = steps.run(configs or [], rounds, seconds, device or "auto")
    if out is not None:
        atomic.write_text(out, json.dumps(to_json_value(result), indent=2) + "\n")

    def render() -> None:
        rates = result["machine"]
        products, convolutions = rates["product_gflops"].items(), rates["convolution_gflops"].items()
        lines = {f"matrix products, {name}": f"{rate:.0f} GFLOP/s" for name, rate in products}
        lines |= {f"convolutions, {name}": f"{rate:.0f} GFLOP/s" for name, rate in convolutions}
        tables.show_block(rates["about"], lines | {"copies": f"{rates['copy_gb_per_second']:.1f} GB/s"})
        columns = ("configuration", "batch", "ms", "items/s", "GFLOP", "MB", "floor by FLOPs", "by bytes", "reached")
        cells = [
            (
                f"{row['config']} {row['phase']}".strip(),
                row["items"],
                f"{1e3 * row['step_seconds']:.4g}",
                row["items_per_second"],
                row["flops"] / 1e9,
                row["bytes"] / 1e6,
                f"{1e3 * row['flop_seconds']:.3g} ms",
                f"{1e3 * row['byte_seconds']:.3g} ms",
                f"{row['share']:.0%}",
            )
            for row in result["rows"]
        ]
        tables.table("a training step, on generated data", columns, cells)
        reasons = dict.fromkeys(row["reason"] for row in result["not_measured"])
        for reason in reasons:
            names = [row["config"] for row in result["not_measured"] if row["reason"] == reason]
            console.show(f"not measured, {reason}: {', '.join(names)}")

    output.show(result, render)


@app.command("compare")
@expand_options
def bench_compare(a: Result, b: Result, *, output: Output) -> None:
    """Compare two results of `cvlab bench --out FILE`: times of the second relative to the first."""
    from cvlab.bench import compare
    from cvlab.reports import tables

    result = compare.compare(a, b)

    def render() -> None:
        for name, (first, second) in result["differences"].items():
            console.show(f"the machines differ in {name}: {first}, {second}")
        rates = {name: f"{ratio:.2f}" for name, ratio in result["rates"].items()}
        tables.show_block(f"rates of the machine, {b.name} / {a.name}", rates)
        columns = ("configuration", f"ms, {a.name}", f"ms, {b.name}", "time for an item", "reached", "reached")
        cells = [
            (
                " ".join(filter(None, (row["config"], row["phase"], _precisions(row)))),
                f"{1e3 * row['step_seconds_a']:.4g}",
                f"{1e3 * row['step_seconds_b']:.4g}",
                f"{row['ratio']:.2f}",
                f"{row['share_a']:.0%}",
                f"{row['share_b']:.0%}",
            )
            for row in result["rows"]
        ]
        tables.table(f"{b.name} / {a.name}", columns, cells)
        for path, key in ((a, "only_a"), (b, "only_b")):
            if result[key]:
                console.show(f"only in {path.name}: {', '.join(result[key])}")

    output.show(result, render)


def _precisions(row: Mapping[str, Any]) -> str:
    """Return both precisions of a row in brackets if they differ."""
    a, b = row["precision_a"], row["precision_b"]
    return f"({a}, {b})" if a != b else ""


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


@app.command("knn")
@expand_options
def bench_knn(
    rounds: Rounds = 3,
    test: Annotated[int, typer.Option(min=1, max=100_000, help="number of test images")] = 50,
    train: Annotated[int, typer.Option(min=1, max=100_000, help="number of training images")] = 500,
    device: Device = None,
    *,
    output: Output,
) -> None:
    """Compare the distances of k-NN with two, one and no loops, and torch.cdist."""
    from cvlab.bench import knn
    from cvlab.reports import tables

    result = knn.distances(rounds, test, train, device or "auto")
    rows = [
        (row["loop"], f"{1e3 * row['seconds']:.4g}", row["against_no_loops"], row["largest_error"])
        for row in result["loops"]
    ]
    columns = ("distances with", "ms (median)", "time relative to no loops", "largest error")
    output.show(result, lambda: tables.table(result["what"], columns, rows))


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
