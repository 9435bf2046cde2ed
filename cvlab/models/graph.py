"""Networks cut at the outputs of named modules, with torch.fx: what no output needs is not computed.

The default network is traced here; networks of timm and torchvision by their own tracer, which knows their modules.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import nn

from cvlab import _compat
from cvlab.models.efficientnet import BatchNormAct2d, Conv2dSame, EfficientNetLite
from cvlab.models.nanodet import CspBackbone

TRACE_FAILURES = (torch.fx.proxy.TraceError, TypeError, NameError, AttributeError)


class _Tracer(torch.fx.Tracer):
    """Records the node that is the output of each module."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, torch.fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return isinstance(m, (Conv2dSame, BatchNormAct2d)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace the call of a module."""
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, torch.fx.Proxy):
            self.outputs[self.path_of_module(m)] = output.node
        return output


def trace(module: nn.Module, layers: Mapping[str, str], whole: str | None = None) -> torch.fx.GraphModule:
    """Return a module that computes the outputs of some layers as a dictionary.

    Args:
        module: A network, whose weights are shared.
        layers: Names of modules, with the keys of their outputs.
        whole: Key of the network's own output; None: it is not computed.

    Raises:
        ValueError: A layer is not computed, or its output is no tensor.
        torch.fx.proxy.TraceError, TypeError, NameError, AttributeError: The control flow depends on the input.
    """
    if isinstance(module, (EfficientNetLite, CspBackbone)):
        return _trace_own(module, layers, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # auxiliary classifiers differ between training and evaluation
        models = _compat.timm().models
        named = dict(layers)
        if whole is not None:
            named[models.get_graph_node_names(module)[1][-1]] = whole
        traced: torch.fx.GraphModule = models.create_feature_extractor(module, named)
    return traced


def _trace_own(module: nn.Module, layers: Mapping[str, str], whole: str | None) -> torch.fx.GraphModule:
    tracer = _Tracer()
    graph = tracer.trace(module)
    output = next(node for node in graph.nodes if node.op == "output")
    for name in layers:
        if name not in tracer.outputs:
            raise ValueError(f"the layer '{name}' is not computed")
    results = {key: tracer.outputs[name] for name, key in layers.items()}
    if whole is not None:
        results[whole] = output.args[0]
    output.args = (results,)
    traced = torch.fx.GraphModule(module, graph)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    traced.train(module.training)
    return traced
