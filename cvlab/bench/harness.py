"""Measurements: alternating, in one process, medians and ratios, because machines are shared and noisy."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cvlab.config import loading as configs
from cvlab.engine import loop as engines
from cvlab.engine import optimizers
from cvlab.engine.loop import Compute
from cvlab.errors import ConfigError
from cvlab.experiments.classification import throughput, train
from cvlab.layers import modules, recurrent, recurrent_reference
from cvlab.layers.attention import AttentionLSTM
from cvlab.layers.modules import MANUAL, MANUAL_ALT

REFERENCE = "vgg_half_60s"
MATRIX = 2048
COPIED_FLOATS = 2**25  # 128 MiB, larger than any cache
CONVOLUTION = (128, 64, 128, 16)  # batch, channels in and out, pixels: the middle of the nets of a minute
SENTENCES = (250, 12, 256, 512, 49, 50)  # of 50 photos: sentences, words, sizes of word and state, cells, maps
FORWARD_AND_BACKWARD = 3  # a backward pass is two products of the size of the forward one


def alternate(loops: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run each loop once to warm it up, then once per round, in turn; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronized(where: Compute, work: Callable[[], object]) -> Callable[[], None]:
    """Return a loop that ends when what it has asked the device for is done."""

    def loop() -> None:
        work()
        where.synchronize()

    return loop


def about(where: Compute, precision: str, rounds: int) -> str:
    """Say what was measured on."""
    return f"{where.device}, {precision}, {where.threads} threads, torch {torch.__version__}, n={rounds}"


def _product(where: Compute, dtype: torch.dtype) -> Callable[[], None]:
    a, b = (torch.randn(MATRIX, MATRIX, device=where.device).to(dtype) for _ in range(2))

    def loop() -> None:
        torch.mm(a, b)
        where.synchronize()

    return loop


def _convolution(where: Compute, dtype: torch.dtype) -> Callable[[], None]:
    n, channels_in, channels_out, size = CONVOLUTION
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, device=where.device, dtype=dtype)
    layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(n, channels_in, size, size, device=where.device).to(dtype, memory_format=torch.channels_last)
    return _pass(layer, x, where)


def _copy(where: Compute) -> Callable[[], None]:
    source, target = (torch.zeros(COPIED_FLOATS, device=where.device) for _ in range(2))

    def loop() -> None:
        target.copy_(source)
        where.synchronize()

    return loop


def machine(rounds: int, device: str) -> dict[str, Any]:
    """Measure the rates that bound every training here: GFLOP/s of products and convolutions, GB/s of copies."""
    where = engines.compute(device)
    names = dict.fromkeys(("float32", where.precision))
    loops = {f"product/{name}": _product(where, engines.DTYPES[name]) for name in names}
    loops |= {f"convolution/{name}": _convolution(where, engines.DTYPES[name]) for name in names}
    seconds = alternate({**loops, "copy": _copy(where)}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    n, channels_in, channels_out, size = CONVOLUTION
    convolution = FORWARD_AND_BACKWARD * 2 * n * channels_in * channels_out * 9 * size**2
    return {
        "about": about(where, where.precision, rounds),
        "product_gflops": {name: 2 * MATRIX**3 / medians[f"product/{name}"] / 1e9 for name in names},
        "convolution_gflops": {name: convolution / medians[f"convolution/{name}"] / 1e9 for name in names},
        "copy_gb_per_second": 2 * 4 * COPIED_FLOATS / medians["copy"] / 1e9,
    }


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
        rate = found["convolution_gflops"][parts.where.precision]
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
        parts.where.synchronize()

    return loop


def _bare_loop(chosen: Any, parts: train.Parts, count: int, where: Compute, layout: Any) -> Callable[[], None]:
    """Make the few lines of PyTorch that one writes by hand: images ready as floats, drawn at random, not augmented."""
    model = copy.deepcopy(parts.model).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = optimizers.build_optimizer(chosen.optimizer.name, model, chosen.optimizer.arguments())
    images, labels = parts.splits["train"]
    floats = parts.batches.normalize(images.permute(0, 3, 1, 2)).contiguous(memory_format=layout)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3

    def loop() -> None:
        for _ in range(count):
            indices = torch.randint(0, len(floats), (chosen.batch_size,), device=where.device)
            with where.autocast():
                scores = model(floats[indices]).float()
                loss = F.cross_entropy(scores, labels[indices], label_smoothing=chosen.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        where.synchronize()

    return loop


def engine(rounds: int, steps: int, device: str, name: str = REFERENCE) -> dict[str, Any]:
    """Compare `fit` with bare loops of the same net, data and optimiser.

    One has the precision and memory format of `fit`, one is in float32 and contiguous.
    """
    chosen, parts = training(name, device)
    where = parts.where
    plain = Compute(where.device, "float32", where.threads)
    same, slow = f"bare loop, {where.precision}, channels_last", "bare loop, float32, contiguous"
    loops = {
        "fit": _fit_loop(chosen, parts, steps),
        same: _bare_loop(chosen, parts, steps, where, torch.channels_last),
        slow: _bare_loop(chosen, parts, steps, plain, torch.contiguous_format),
    }
    seconds = alternate(loops, rounds)
    rows = [
        {
            "loop": loop,
            "images_per_second": chosen.batch_size * steps / statistics.median(seconds[loop]),
            "against_bare": _median_ratio(seconds[loop], seconds[same]),
            "seconds": seconds[loop],
        }
        for loop in loops
    ]
    return {
        "ok": True,
        "what": f"{name}, batch {chosen.batch_size}, {about(where, where.precision, rounds)}",
        "loops": rows,
        "fit_against_bare": rows[0]["against_bare"],
        "fit_speedup_over_float32_contiguous": _median_ratio(seconds[slow], seconds["fit"]),
    }


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _layer_shapes() -> list[tuple[str, tuple[Any, ...], tuple[int, ...]]]:
    """List the layers of the reference net: name, constructor arguments, shape of one image's input."""
    model = getattr(configs.load(REFERENCE).config, "model", None)
    assert model is not None
    found: list[tuple[str, tuple[Any, ...], tuple[int, ...]]] = []
    channels, size = 3, 32
    for index, width in enumerate(model.filters):
        found.append(("Conv2d", (channels, width, 3, 1, 1), (channels, size, size)))
        found.append(("BatchNorm2d", (width,), (width, size, size)))
        if index in model.pools:
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
    """Time forward plus backward of each hand-written layer against torch's, on the reference's shapes, in float32."""
    where = engines.compute(device, "float32")
    batch: int = getattr(configs.load(REFERENCE).config, "batch_size", 0)
    spaces = {"torch": nn, "manual": MANUAL, "manual_alt": MANUAL_ALT}
    rows = []
    for name, arguments, shape in _layer_shapes():
        x = torch.randn(batch, *shape, device=where.device)
        x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
        made = {key: getattr(space, name)(*arguments).to(where.device) for key, space in spaces.items()}
        seconds = alternate({key: _pass(layer, x, where) for key, layer in made.items()}, rounds)
        rows.append(_layer_row(name, [batch, *shape], seconds))
    rows += _recurrent(where, rounds)
    return {"ok": True, "what": f"forward + backward, {about(where, 'float32', rounds)}", "layers": rows}


def _layer_row(name: str, shape: list[int], seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    ratios = {
        f"{kind}_against_torch": _median_ratio(seconds[kind], seconds["torch"]) if kind in seconds else None
        for kind in ("manual", "manual_alt")
    }
    return {"layer": name, "input": shape, "torch_seconds": statistics.median(seconds["torch"]), **ratios}


def _recurrent(where: Compute, rounds: int) -> list[dict[str, Any]]:
    """Time the recurrent layers on a captioner's shapes; torch has no LSTM that attends, autograd's is taken."""
    n, t, d, h, cells, maps = SENTENCES
    x, start, seen = (torch.randn(*shape, device=where.device) for shape in ((n, t, d), (n, h), (maps, cells, h)))

    def weights(gates: int, *inputs: int) -> list[Tensor]:
        return [torch.randn(gates * h, size, device=where.device) / size**0.5 for size in inputs]

    cases: list[tuple[str, type[Any], list[Tensor], Callable[[], Tensor]]] = []
    for name, layer, library, gates in (("RNN", recurrent.RNN, nn.RNN, 1), ("LSTM", recurrent.LSTM, nn.LSTM, 4)):
        made = library(d, h, batch_first=True).to(where.device)
        inputs = [x, start, *weights(gates, d, h), torch.zeros(gates * h, device=where.device)]
        cases.append((name, layer, inputs, lambda made=made: made(x.requires_grad_(True))[0]))  # type: ignore[misc]
    inputs = [x, seen, *weights(4, d, h, h), torch.zeros(4 * h, device=where.device)]
    cases.append(("AttentionLSTM", AttentionLSTM, inputs, lambda: recurrent_reference.attention_lstm(*inputs)))
    rows = []
    for name, layer, given, theirs in cases:
        leaves = [tensor.requires_grad_(True) for tensor in given]
        loops = {
            "torch": lambda theirs=theirs: theirs().sum().backward(),
            "manual": lambda layer=layer, leaves=leaves: modules.apply(layer, *leaves).sum().backward(),  # type: ignore[misc]
        }
        seconds = alternate(loops, rounds)
        rows.append(_layer_row(name, [n, t, d], seconds))
    return rows
