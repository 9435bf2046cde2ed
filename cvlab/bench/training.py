"""The engine against a bare training loop."""

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cvlab.bench.harness import about, alternate, median_ratio
from cvlab.bench.machine import machine
from cvlab.config import loading as configs
from cvlab.engine import optimizers
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError
from cvlab.experiments.classification import throughput, train

REFERENCE = "cifar_vgg_half_60s"


def every_config(found: Mapping[str, Any], device: str, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Measure images/s of the shipped trainings, on noise, and their share of the machine's rate of convolutions."""
    rows = []
    for name in names or configs.shipped_names():
        if configs.load(name).config.experiment != "classify":
            continue
        chosen, parts = training(name, device)
        with FlopCounterMode(display=False) as counter:
            next(throughput.steps(chosen, parts))
        speed = throughput.images_per_second(chosen, parts)
        gflops = counter.get_total_flops() / chosen.batch_size * speed / 1e9
        rate = found["convolution_gflops"][parts.ctx.precision]
        row = {"config": name, "images_per_second": speed, "gflop_per_second": gflops, "share": gflops / rate}
        rows.append(row | {"mflop_per_image": counter.get_total_flops() / chosen.batch_size / 1e6})
    return rows


def everything(rounds: int, device: str) -> dict[str, Any]:
    """Measure the machine, then every shipped training against it."""
    found = machine(rounds, device)
    return {"ok": True, "machine": found, "configs": every_config(found, device)}


def training(name: str, device: str) -> tuple[Any, train.Parts]:
    """Build a shipped or own configuration of a training, on noise."""
    if configs.load(name).config.experiment != "classify":
        raise ConfigError(f"{name}: not a training of a classifier")
    loaded = configs.load(name, [f"device={device}"])
    chosen: Any = loaded.config
    return chosen, throughput.build(chosen, loaded.base)


def _fit_loop(chosen: Any, parts: train.Parts, count: int) -> Callable[[], None]:
    """Make the engine's loop: shuffled uint8 batches, augmented, the losses checked."""
    steps = throughput.steps(chosen, parts)

    def loop() -> None:
        for _ in itertools.islice(steps, count):
            pass
        parts.ctx.synchronize()

    return loop


def _bare_loop(chosen: Any, parts: train.Parts, count: int, ctx: ComputeContext, layout: Any) -> Callable[[], None]:
    """Make the few lines of PyTorch that one writes by hand: images ready as floats, drawn at random, not augmented."""
    model = copy.deepcopy(parts.model).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = optimizers.build_optimizer(chosen.optimizer.name, model, chosen.optimizer.arguments())
    images, labels = parts.splits["train"]
    floats = parts.batches.normalize(images.permute(0, 3, 1, 2)).contiguous(memory_format=layout)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3

    def loop() -> None:
        for _ in range(count):
            indices = torch.randint(0, len(floats), (chosen.batch_size,), device=ctx.device)
            with ctx.autocast():
                scores = model(floats[indices]).float()
                loss = F.cross_entropy(scores, labels[indices], label_smoothing=chosen.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ctx.synchronize()

    return loop


def engine(rounds: int, steps: int, device: str, name: str = REFERENCE) -> dict[str, Any]:
    """Compare `fit` with bare loops of the same net, data and optimiser.

    One has the precision and memory format of `fit`, one is in float32 and contiguous.
    """
    chosen, parts = training(name, device)
    ctx = parts.ctx
    plain = ComputeContext(ctx.device, "float32", ctx.threads)
    same, slow = f"bare loop, {ctx.precision}, channels_last", "bare loop, float32, contiguous"
    loops = {
        "fit": _fit_loop(chosen, parts, steps),
        same: _bare_loop(chosen, parts, steps, ctx, torch.channels_last),
        slow: _bare_loop(chosen, parts, steps, plain, torch.contiguous_format),
    }
    seconds = alternate(loops, rounds)
    rows = [
        {
            "loop": loop,
            "images_per_second": chosen.batch_size * steps / statistics.median(seconds[loop]),
            "against_bare": median_ratio(seconds[loop], seconds[same]),
            "seconds": seconds[loop],
        }
        for loop in loops
    ]
    return {
        "ok": True,
        "what": f"{name}, batch {chosen.batch_size}, {about(ctx, ctx.precision, rounds)}",
        "loops": rows,
        "fit_against_bare": rows[0]["against_bare"],
        "fit_speedup_over_float32_contiguous": median_ratio(seconds[slow], seconds["fit"]),
    }
