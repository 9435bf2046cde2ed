"""Measurements: alternating, in one process, medians and ratios, because machines are shared and noisy."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab import engine as engines
from cvlab.data.images import TrainBatches, normalization
from cvlab.engine import Compute, Training
from cvlab.layers.modules import MANUAL, MANUAL_ALT
from cvlab.models.convnet import deep_convnet

VGG_HALF: dict[str, Any] = {"filters": (32, 64, 128, 128), "pools": (0, 1, 3), "batchnorm": True}
BATCH = 128
IMAGES = 5_000


def alternate(loops: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run each loop once per round, in turn, and return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _data(where: Compute) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    return images.to(where.device), labels.to(where.device)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> engines.Losses:
    scores = model(batch[0])
    return {"loss": F.cross_entropy(scores.float(), batch[1])}


def _fit_loop(where: Compute, steps: int) -> Callable[[], None]:
    """Make the engine's loop: shuffled uint8 batches, the losses checked, through `fit`."""
    torch.manual_seed(0)
    model = deep_convnet(**VGG_HALF).to(where.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = _data(where)
    batches = TrainBatches(images, labels, BATCH, 0, normalization(images, "mean", torch.float32, where.device))
    training = Training(model, torch.optim.Adam(model.parameters(), lr=2e-3, fused=True))

    def loop() -> None:
        until = training.step + steps
        for _ in engines.fit(training, _loss, batches, total_steps=until, lr_factor=lambda progress: 1.0, where=where):
            pass
        where.synchronize()

    return loop


def _bare_loop(where: Compute, steps: int, channels_last: bool) -> Callable[[], None]:
    """Make twenty lines of PyTorch, as one writes them by hand."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    blocks: list[nn.Module] = []
    channels = 3
    for index, width in enumerate(VGG_HALF["filters"]):
        blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        blocks += [nn.MaxPool2d(2)] if index in VGG_HALF["pools"] else []
        channels = width
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))
    model = model.to(where.device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, labels = _data(where)
    floats = ((images.permute(0, 3, 1, 2).float() / 255) - 0.5).contiguous(memory_format=layout)

    def loop() -> None:
        for _ in range(steps):
            chosen = torch.randint(0, IMAGES, (BATCH,), device=where.device)
            with where.autocast():
                loss = F.cross_entropy(model(floats[chosen]).float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        where.synchronize()

    return loop


def engine(rounds: int, steps: int, device: str) -> dict[str, Any]:
    """Compare `fit` with bare loops on the net of vgg_half_60s: batch 128, 32 px, Adam.

    The bare loops are the same net, data and optimiser, once with the precision and memory format of `fit`, once in
    float32 and contiguous.
    """
    where = engines.compute(device)
    plain = Compute(where.device, "float32", where.threads)
    same, slow = f"bare loop, {where.precision}, channels_last", "bare loop, float32, contiguous"
    loops = {
        "fit": _fit_loop(where, steps),
        same: _bare_loop(where, steps, channels_last=True),
        slow: _bare_loop(plain, steps, channels_last=False),
    }
    for loop in loops.values():
        loop()
    seconds = alternate(loops, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {
        name: statistics.median(a / b for a, b in zip(v, seconds[same], strict=True)) for name, v in seconds.items()
    }
    return {
        "ok": True,
        "what": f"vgg_half, batch {BATCH}, {where.device}, {where.precision}, {where.threads} threads, "
        f"torch {torch.__version__}, n={rounds}",
        "loops": [
            {
                "loop": name,
                "images_per_second": BATCH * steps / medians[name],
                "against_bare": ratio[name],
                "seconds": seconds[name],
            }
            for name in loops
        ],
        "fit_against_bare": ratio["fit"],
        "fit_speedup_over_float32_contiguous": statistics.median(
            a / b for a, b in zip(seconds[slow], seconds["fit"], strict=True)
        ),
    }


def _layer_shapes() -> list[tuple[str, tuple[Any, ...], tuple[int, ...]]]:
    """List the layers of vgg_half: name, constructor arguments, shape of one image's input."""
    found: list[tuple[str, tuple[Any, ...], tuple[int, ...]]] = []
    channels, size = 3, 32
    for index, width in enumerate(VGG_HALF["filters"]):
        found.append(("Conv2d", (channels, width, 3, 1, 1), (channels, size, size)))
        found.append(("BatchNorm2d", (width,), (width, size, size)))
        if index in VGG_HALF["pools"]:
            found.append(("MaxPool2d", (2,), (width, size, size)))
            size //= 2
        found.append(("ReLU", (), (width, size, size)))
        channels = width
    return [*found, ("Linear", (channels * size * size, 10), (channels * size * size,))]


def _pass(layer: nn.Module, x: Tensor, where: Compute) -> Callable[[], None]:
    """Make one forward and backward pass through a layer, from random upstream gradients."""
    dout = torch.randn_like(layer(x))

    def loop() -> None:
        layer(x.detach().requires_grad_()).backward(dout)
        where.synchronize()

    return loop


def layers(rounds: int, device: str) -> dict[str, Any]:
    """Time forward plus backward of each hand-written layer against torch's, on the shapes of vgg_half, in float32."""
    where = engines.compute(device, "float32")
    spaces = {"torch": nn, "manual": MANUAL, "manual_alt": MANUAL_ALT}
    rows = []
    for name, arguments, shape in _layer_shapes():
        x = torch.randn(BATCH, *shape, device=where.device)
        x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
        made = {key: getattr(space, name)(*arguments).to(where.device) for key, space in spaces.items()}
        loops = {key: _pass(layer, x, where) for key, layer in made.items()}
        for loop in loops.values():
            loop()
        seconds = alternate(loops, rounds)
        ratio = {
            key: statistics.median(a / b for a, b in zip(values, seconds["torch"], strict=True))
            for key, values in seconds.items()
        }
        rows.append(
            {
                "layer": name,
                "input": [BATCH, *shape],
                "torch_seconds": statistics.median(seconds["torch"]),
                "manual_against_torch": ratio["manual"],
                "manual_alt_against_torch": ratio["manual_alt"],
            }
        )
    what = (
        f"forward + backward, {where.device}, float32, {where.threads} threads, torch {torch.__version__}, n={rounds}"
    )
    return {"ok": True, "what": what, "layers": rows}
