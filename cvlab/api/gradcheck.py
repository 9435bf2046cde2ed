"""`cvlab gradcheck`: check hand-written layers, losses, update rules and models, or a layer of the user."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvlab import registry
from cvlab.engine import optimizers
from cvlab.experiments.classification.models.convnet import deep_convnet, three_layer_convnet
from cvlab.experiments.classification.models.mlp import mlp
from cvlab.experiments.classification.models.resnet import preact_resnet
from cvlab.layers import gradcheck, gradcheck_cases
from cvlab.layers.gradcheck import GradCheckResult
from cvlab.layers.init import init_weights
from cvlab.layers.modules import MANUAL_ALT_LAYERS, MANUAL_LAYERS

KAIMING = "Kaiming initialization"
UPDATES: dict[str, tuple[str, dict[str, float]]] = {
    "SGD": ("sgd", {"lr": 0.1}),
    "SGD, momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "RMSProp": ("rmsprop", {"lr": 0.1}),
    "Adam": ("adam", {"lr": 0.1}),
}


def _models(layers: Any) -> dict[str, nn.Module]:
    """Build small models of each family from a namespace of layers, for 2-channel pictures of 6 px."""
    shape: dict[str, Any] = {"in_channels": 2, "image_size": 6, "num_classes": 3, "layers": layers}
    return {
        "fc_net": mlp(hidden=(7, 6), weight_scale=0.5, **shape),
        "three_layer_convnet": three_layer_convnet(3, 3, 5, weight_scale=0.5, **shape),
        "deep_convnet": deep_convnet(filters=(3, 4), pools=(0,), **shape),
        "deep_convnet, BatchNorm": deep_convnet(filters=(3, 4), pools=(1,), batchnorm=True, **shape),
        "preact_resnet, BatchNorm": preact_resnet(stem=2, stages=((2, 1), (3, 1)), **shape),
    }


def _check_models(names: Sequence[str] | None) -> list[GradCheckResult]:
    images, labels = torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    references, results = _models(nn), []
    for suffix, layers in (("", MANUAL_LAYERS), (", simplified", MANUAL_ALT_LAYERS)):
        for name, model in _models(layers).items():
            is_duplicate = suffix and "BatchNorm" not in name
            if not is_duplicate and (names is None or name + suffix in names):
                results.append(gradcheck.check_model(name + suffix, model, references[name], images, labels))
    return results


def _check_update(name: str) -> GradCheckResult:
    """Compare ten steps of a hand-written update rule with torch.optim's, on the same random gradients."""
    kind, settings = UPDATES[name]
    param = nn.Parameter(torch.randn(20, dtype=torch.float64))
    reference_param = nn.Parameter(param.detach().clone())
    manual = registry.import_name(optimizers.OPTIMIZERS.names[f"manual_{kind}"])([param], **settings)
    reference = registry.import_name(optimizers.OPTIMIZERS.names[kind])([reference_param], **settings)
    for _ in range(10):
        param.grad = torch.randn_like(param)
        reference_param.grad = param.grad.clone()
        manual.step()
        reference.step()
    error = gradcheck.relative_error(param.detach(), reference_param.detach())
    return GradCheckResult(name, None, error, gradcheck.TORCH_TOLERANCE)


def _check_kaiming() -> GradCheckResult:
    """Send noise through 20 linear layers and ReLUs: each must keep its mean square, so that depth changes nothing.

    He et al., 2015, section 2.2. The error is that of the mean gain per layer; without the factor 2 it is 0.5.
    """
    width, depth = 512, 20
    x = torch.randn(64, width)
    start = x.square().mean()
    for _ in range(depth):
        x = init_weights(nn.Linear(width, width), "kaiming", before_relu=True)(x).relu()
    gain = (x.square().mean() / start).item() ** (1 / depth)
    return GradCheckResult(KAIMING, abs(gain - 1), None, 0.1)


def run(names: Sequence[str], seed: int) -> dict[str, Any]:
    """Check hand-written gradients.

    Args:
        names: Layers, losses, update rules and models; `./file.py:Name` is a layer of the user. Empty for all.
        seed: Seed of the random inputs.

    Returns:
        `ok`, and `checks`: `name`, `numeric_error`, `torch_error`, `tolerance`, `ok` and `wrong_gradients` of each.

    Raises:
        ConfigError: There is no such layer.
    """
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    try:
        verdicts = _check_named(names) + _check_models(names or None)
    finally:
        torch.set_num_threads(threads)
    rows = [dataclasses.asdict(verdict) | {"ok": verdict.ok} for verdict in verdicts]
    return {"ok": all(verdict.ok for verdict in verdicts), "checks": rows}


def _check_named(names: Sequence[str]) -> list[GradCheckResult]:
    """Check everything but the models."""
    cases = {case.name: case for case in gradcheck_cases.cases()}
    models = list(_models(nn))
    known = [*cases, *models, *(f"{model}, simplified" for model in models if "BatchNorm" in model), *UPDATES, KAIMING]
    verdicts = []
    for name in names or (*cases, *UPDATES, KAIMING):
        if registry.is_user_file(name):
            verdicts.append(gradcheck.check(gradcheck.user_case(name, registry.import_user_object(name, Path()))))
        elif name in cases:
            verdicts.append(gradcheck.check(cases[name]))
        elif name in UPDATES:
            verdicts.append(_check_update(name))
        elif name == KAIMING:
            verdicts.append(_check_kaiming())
        elif name not in known:
            raise registry.unknown_name_error("layer", name, known)
    return verdicts
