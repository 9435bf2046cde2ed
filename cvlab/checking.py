"""`cvlab gradcheck`: every hand-written layer, loss and whole net, or the user's own layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvlab import lookup
from cvlab.layers import gradcheck
from cvlab.layers.gradcheck import Verdict
from cvlab.layers.modules import MANUAL, MANUAL_ALT
from cvlab.models.convnet import deep_convnet, three_layer_convnet
from cvlab.models.fc_net import fc_net


def _nets(layers: Any) -> dict[str, nn.Module]:
    """Build small nets of each family from a namespace of layers, for 2-channel pictures of 6 px."""
    shape: dict[str, Any] = {"in_channels": 2, "image_size": 6, "num_classes": 3, "layers": layers}
    return {
        "fc_net": fc_net(hidden=(7, 6), weight_scale=0.5, **shape),
        "three_layer_convnet": three_layer_convnet(3, 3, 5, weight_scale=0.5, **shape),
        "deep_convnet": deep_convnet(filters=(3, 4), pools=(0,), **shape),
        "deep_convnet, BatchNorm": deep_convnet(filters=(3, 4), pools=(1,), batchnorm=True, **shape),
    }


def _check_nets(wanted: Sequence[str] | None) -> list[Verdict]:
    images, labels = torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    theirs, found = _nets(nn), []
    for suffix, layers in (("", MANUAL), (", simplified", MANUAL_ALT)):
        for name, mine in _nets(layers).items():
            simplified = suffix and "BatchNorm" not in name
            if not simplified and (wanted is None or name + suffix in wanted):
                found.append(gradcheck.check_net(name + suffix, mine, theirs[name], images, labels))
    return found


def run(names: Sequence[str], seed: int) -> dict[str, Any]:
    """Check the layers and nets called `names`, all where there are none; `./file.py:Name` is the user's own layer.

    Returns `{"ok", "checks": [{"name", "numeric_error", "autograd_error", "tolerance", "ok"}]}`.
    """
    torch.manual_seed(seed)
    cases = {case.name: case for case in gradcheck.cases()}
    known = [*cases, *_nets(nn), "deep_convnet, BatchNorm, simplified"]
    verdicts = []
    for name in names or cases:
        if lookup.is_user_file(name):
            verdicts.append(gradcheck.check(gradcheck.user_case(name, lookup.import_user_object(name, Path()))))
        elif name in cases:
            verdicts.append(gradcheck.check(cases[name]))
        elif name not in known:
            raise lookup.unknown("layer", name, known)
    verdicts += _check_nets(names or None)
    rows = [vars(verdict) | {"ok": verdict.ok} for verdict in verdicts]
    return {"ok": all(verdict.ok for verdict in verdicts), "checks": rows}
