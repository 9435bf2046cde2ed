"""Hand-written layers against torch's own."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cvlab.bench.harness import about, alternate, forward_backward_loop, median_ratio
from cvlab.bench.training import REFERENCE
from cvlab.config import loading as configs
from cvlab.engine import device as engine_device
from cvlab.engine.device import ComputeContext
from cvlab.layers import modules, recurrent, reference
from cvlab.layers.attention import AttentionLSTM
from cvlab.layers.modules import MANUAL_ALT_LAYERS, MANUAL_LAYERS

SENTENCES = (250, 12, 256, 512, 49, 50)  # of 50 photos: sentences, words, sizes of word and state, cells, maps


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


def layers(rounds: int, device: str) -> dict[str, Any]:
    """Time forward plus backward of each hand-written layer against torch's, on the reference's shapes, in float32."""
    ctx = engine_device.select_device(device, "float32")
    batch: int = getattr(configs.load(REFERENCE).config, "batch_size", 0)
    spaces = {"torch": nn, "manual": MANUAL_LAYERS, "manual_alt": MANUAL_ALT_LAYERS}
    rows = []
    for name, arguments, shape in _layer_shapes():
        x = torch.randn(batch, *shape, device=ctx.device)
        x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
        made = {key: getattr(space, name)(*arguments).to(ctx.device) for key, space in spaces.items()}
        seconds = alternate({key: forward_backward_loop(layer, x, ctx) for key, layer in made.items()}, rounds)
        rows.append(_layer_row(name, [batch, *shape], seconds))
    rows += _recurrent(ctx, rounds)
    return {"ok": True, "what": f"forward + backward, {about(ctx, 'float32', rounds)}", "layers": rows}


def _layer_row(name: str, shape: list[int], seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    ratios = {
        f"{kind}_against_torch": median_ratio(seconds[kind], seconds["torch"]) if kind in seconds else None
        for kind in ("manual", "manual_alt")
    }
    return {"layer": name, "input": shape, "torch_seconds": statistics.median(seconds["torch"]), **ratios}


def _recurrent(ctx: ComputeContext, rounds: int) -> list[dict[str, Any]]:
    """Time the recurrent layers on a captioner's shapes; torch has no LSTM that attends, autograd's is taken."""
    n, t, d, h, cells, maps = SENTENCES
    x, start, seen = (torch.randn(*shape, device=ctx.device) for shape in ((n, t, d), (n, h), (maps, cells, h)))

    def weights(gates: int, *inputs: int) -> list[Tensor]:
        return [torch.randn(gates * h, size, device=ctx.device) / size**0.5 for size in inputs]

    cases: list[tuple[str, type[Any], list[Tensor], Callable[[], Tensor]]] = []
    for name, layer, library, gates in (("RNN", recurrent.RNN, nn.RNN, 1), ("LSTM", recurrent.LSTM, nn.LSTM, 4)):
        made = library(d, h, batch_first=True).to(ctx.device)
        inputs = [x, start, *weights(gates, d, h), torch.zeros(gates * h, device=ctx.device)]
        cases.append((name, layer, inputs, lambda made=made: made(x.requires_grad_(True))[0]))  # type: ignore[misc]
    inputs = [x, seen, *weights(4, d, h, h), torch.zeros(4 * h, device=ctx.device)]
    cases.append(("AttentionLSTM", AttentionLSTM, inputs, lambda: reference.attention_lstm(*inputs)))
    rows = []
    for name, layer, given, theirs in cases:
        leaves = [tensor.requires_grad_(True) for tensor in given]
        loops = {
            "torch": lambda theirs=theirs: theirs().sum().backward(),
            "manual": lambda layer=layer, leaves=leaves: modules.apply_layer(layer, *leaves).sum().backward(),  # type: ignore[misc]
        }
        seconds = alternate(loops, rounds)
        rows.append(_layer_row(name, [n, t, d], seconds))
    return rows
