"""Compare the hand-written layers with those of torch, forward plus backward.

Command: python benchmarks/layers.py --rounds 7
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvlab.bench.harness import alternate, argument_parser, describe, forward_backward_loop, median_ratio, print_result
from cvlab.bench.training import REFERENCE
from cvlab.config import loading as configs
from cvlab.engine import device as engine_device
from cvlab.engine.device import ComputeContext
from cvlab.layers import modules, recurrent, reference
from cvlab.layers.attention import AttentionLSTM
from cvlab.layers.modules import MANUAL_ALT_LAYERS, MANUAL_LAYERS

CAPTIONS = (250, 12, 256, 512, 49, 50)  # captions, words, embedding size, hidden size, spatial positions, photos


def _layer_shapes() -> list[tuple[str, tuple[Any, ...], tuple[int, ...]]]:
    """List the layers of the reference model: name, constructor arguments, shape of one image's input."""
    model = getattr(configs.load(REFERENCE).config, "model", None)
    assert model is not None
    shapes: list[tuple[str, tuple[Any, ...], tuple[int, ...]]] = []
    channels, size = 3, 32
    for index, width in enumerate(model.filters):
        shapes.append(("Conv2d", (channels, width, 3, 1, 1), (channels, size, size)))
        shapes.append(("BatchNorm2d", (width,), (width, size, size)))
        if index in model.pools:
            shapes.append(("MaxPool2d", (2,), (width, size, size)))
            size //= 2
        shapes.append(("ReLU", (), (width, size, size)))
        channels = width
    return [*shapes, ("Linear", (channels * size * size, 10), (channels * size * size,))]


def run(rounds: int, device: str) -> dict[str, Any]:
    """Time forward plus backward of each layer and of torch's, with the shapes of the reference model, in float32."""
    ctx = engine_device.select_device(device, "float32")
    batch: int = getattr(configs.load(REFERENCE).config, "batch_size", 0)
    namespaces = {"torch": nn, "manual": MANUAL_LAYERS, "manual_alt": MANUAL_ALT_LAYERS}
    rows = []
    for name, arguments, shape in _layer_shapes():
        x = torch.randn(batch, *shape, device=ctx.device)
        x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
        instances = {key: getattr(namespace, name)(*arguments).to(ctx.device) for key, namespace in namespaces.items()}
        seconds = alternate({key: forward_backward_loop(layer, x, ctx) for key, layer in instances.items()}, rounds)
        rows.append(_layer_row(name, [batch, *shape], seconds))
    rows += _recurrent(ctx, rounds)
    return {"ok": True, "what": f"forward + backward, {describe(ctx, 'float32', rounds)}", "layers": rows}


def _layer_row(name: str, shape: list[int], seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    ratios = {
        f"{kind}_against_torch": median_ratio(seconds[kind], seconds["torch"]) if kind in seconds else None
        for kind in ("manual", "manual_alt")
    }
    return {"layer": name, "input": shape, "torch_seconds": statistics.median(seconds["torch"]), **ratios}


def _recurrent(ctx: ComputeContext, rounds: int) -> list[dict[str, Any]]:
    """Time the recurrent layers with the shapes of a captioner; autograd is the reference of the attention LSTM."""
    n, t, d, h, positions, photos = CAPTIONS
    shapes = ((n, t, d), (n, h), (photos, positions, h))
    x, initial_state, features = (torch.randn(*shape, device=ctx.device) for shape in shapes)

    def weights(gates: int, *inputs: int) -> list[Tensor]:
        return [torch.randn(gates * h, size, device=ctx.device) / size**0.5 for size in inputs]

    cases: list[tuple[str, type[Any], list[Tensor], Callable[[], Tensor]]] = []
    for name, layer, library, gates in (("RNN", recurrent.RNN, nn.RNN, 1), ("LSTM", recurrent.LSTM, nn.LSTM, 4)):
        torch_layer = library(d, h, batch_first=True).to(ctx.device)
        inputs = [x, initial_state, *weights(gates, d, h), torch.zeros(gates * h, device=ctx.device)]
        cases.append((name, layer, inputs, lambda run=torch_layer: run(x.requires_grad_(True))[0]))  # type: ignore[misc]
    attention_inputs = [x, features, *weights(4, d, h, h), torch.zeros(4 * h, device=ctx.device)]
    cases.append(
        ("AttentionLSTM", AttentionLSTM, attention_inputs, lambda: reference.attention_lstm(*attention_inputs))
    )
    rows = []
    for name, layer, inputs, reference_loop in cases:
        leaves = [tensor.requires_grad_(True) for tensor in inputs]
        loops = {
            "torch": lambda loop=reference_loop: loop().sum().backward(),
            "manual": lambda layer=layer, leaves=leaves: modules.apply_layer(layer, *leaves).sum().backward(),  # type: ignore[misc]
        }
        seconds = alternate(loops, rounds)
        rows.append(_layer_row(name, [n, t, d], seconds))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = argument_parser(__doc__ or "", rounds=15).parse_args(arguments)
    result = run(options.rounds, options.device)
    keys = ("layer", "input", "torch_seconds", "manual_against_torch", "manual_alt_against_torch")
    rows = [[row[key] for key in keys] for row in result["layers"]]
    columns = ("layer", "input", "torch, seconds", "manual / torch", "manual_alt / torch")
    print_result(result, options.json, columns, rows)


if __name__ == "__main__":
    main()
