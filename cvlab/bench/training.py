"""Training speed of the engine relative to a bare training loop."""

import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from cvlab.bench.harness import alternate, describe, median_ratio
from cvlab.config import loading as configs
from cvlab.engine import parameters
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError
from cvlab.experiments.classification import throughput
from cvlab.experiments.classification.config import ClassifyConfig
from cvlab.experiments.classification.setup import ClassificationSetup

REFERENCE = "cifar_vgg_half_60s"


def training(name: str, device: str) -> tuple[ClassifyConfig, ClassificationSetup]:
    """Build the training run of a configuration, on noise."""
    if configs.load(name).config.experiment != "classify":
        raise ConfigError(f"{name}: not a training run of a classifier")
    loaded = configs.load(name, [f"device={device}"])
    config = loaded.config
    assert isinstance(config, ClassifyConfig)
    return config, throughput.build_on_synthetic_images(config, loaded.base)


def _fit_loop(config: ClassifyConfig, parts: ClassificationSetup, count: int) -> Callable[[], None]:
    """Return the engine's loop: shuffled uint8 batches, augmented, the losses checked."""
    steps = throughput.train_steps(config, parts)

    def loop() -> None:
        for _ in itertools.islice(steps, count):
            pass
        parts.ctx.synchronize()

    return loop


def _bare_loop(
    config: ClassifyConfig, parts: ClassificationSetup, count: int, ctx: ComputeContext, layout: torch.memory_format
) -> Callable[[], None]:
    """Return a loop of plain PyTorch: images already converted to floats, drawn at random, not augmented."""
    model = copy.deepcopy(parts.model).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = parameters.build_optimizer(config, model)
    images, labels = parts.splits["train"]
    floats = parts.train_loader.normalize(images[:].permute(0, 3, 1, 2)).contiguous(memory_format=layout)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3

    def loop() -> None:
        for _ in range(count):
            indices = torch.randint(0, len(floats), (config.batch_size,), device=ctx.device)
            with ctx.autocast():
                logits = model(floats[indices]).float()
                loss = F.cross_entropy(logits, labels[indices], label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ctx.synchronize()

    return loop


def engine(rounds: int, steps: int, device: str, name: str = REFERENCE) -> dict[str, Any]:
    """Compare `fit` with bare loops of the same model, data and optimizer.

    One loop has the precision and memory format of `fit`, the other is in float32 and contiguous.
    """
    config, parts = training(name, device)
    ctx = parts.ctx
    plain = ComputeContext(ctx.device, "float32", ctx.threads)
    same, contiguous = f"bare loop, {ctx.precision}, channels_last", "bare loop, float32, contiguous"
    loops = {
        "fit": _fit_loop(config, parts, steps),
        same: _bare_loop(config, parts, steps, ctx, torch.channels_last),
        contiguous: _bare_loop(config, parts, steps, plain, torch.contiguous_format),
    }
    seconds = alternate(loops, rounds)
    rows = [
        {
            "loop": loop,
            "images_per_second": config.batch_size * steps / statistics.median(seconds[loop]),
            "against_bare": median_ratio(seconds[loop], seconds[same]),
            "seconds": seconds[loop],
        }
        for loop in loops
    ]
    return {
        "ok": True,
        "what": f"{name}, batch {config.batch_size}, {describe(ctx, ctx.precision, rounds)}",
        "loops": rows,
        "fit_against_bare": rows[0]["against_bare"],
        "fit_speedup_over_float32_contiguous": median_ratio(seconds[contiguous], seconds["fit"]),
    }
