"""Cut a pretrained classifier into a frozen trunk, a tail that is fine-tuned, and a classifier that is replaced."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.models.graph import TRACE_FAILURES, trace
from cvlab.models.pretrained import PretrainedClassifier

CUT, FEATURES = "cut", "features"
TOLERANCE = 1e-3  # of the largest feature


@dataclass(frozen=True)
class SplitBackbone:
    """A backbone in two parts, both in evaluation mode, without gradients, and sharing no weight with the original.

    Attributes:
        trunk: Maps normalized images (N, 3, S, S) to what the tail takes.
        tail: Maps that to the features (N, F) that the classifier takes.
        num_features: F.
        map_shape: Shape of what the trunk makes of one image.
    """

    trunk: nn.Module
    tail: nn.Module
    num_features: int
    map_shape: tuple[int, ...]


def stages(module: nn.Module) -> list[str]:
    """Return the names of a network's parts with weights in order: its children, and those of sequences among them."""
    names = []
    for name, child in module.named_children():
        is_sequence = isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child) > 1
        parts = [(f"{name}.{key}", part) for key, part in child.named_children()] if is_sequence else [(name, child)]
        names += [key for key, part in parts if any(True for _ in part.parameters())]
    return names


@functools.lru_cache(maxsize=1)
def split(model: PretrainedClassifier, trainable_stages: int) -> SplitBackbone:
    """Split a classifier before its last stages; the last result is cached.

    Args:
        model: The classifier.
        trainable_stages: Number of stages with weights in the tail, not counting the classifier; 0: no weights.

    Returns:
        Trunk and tail.

    Raises:
        ConfigError: The network cannot be split there.
    """
    module = copy.deepcopy(model.module.model)
    _remove_classifier(module, model.name)
    names = stages(module)
    if trainable_stages >= len(names):
        raise ConfigError(
            f"model.trainable_stages {trainable_stages}: {model.name} has {len(names)} stages",
            f"at most {len(names) - 1}",
        )
    size = model.transform.size_px
    image = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    image = image.to(next(module.parameters()).device)
    with torch.inference_mode():
        expected = module(image)
    if not isinstance(expected, Tensor) or expected.ndim != 2:
        raise ConfigError(f"{model.name}: without its classifier it gives no features (N, F)", "name another backbone")
    if trainable_stages == 0:
        whole = module.eval().requires_grad_(False)
        return SplitBackbone(whole, nn.Identity(), expected.shape[1], tuple(expected.shape[1:]))
    for count in range(trainable_stages, len(names)):  # a stage that another path goes around is no place to split
        parts = _split_after(module, names[-1 - count])
        if parts is None:
            continue
        trunk, tail = parts
        with torch.inference_mode():
            maps = trunk(image)
            features = tail(maps)
        if (features - expected).abs().max() <= TOLERANCE * expected.abs().max():
            return SplitBackbone(trunk, tail, expected.shape[1], tuple(maps.shape[1:]))
    raise ConfigError(f"{model.name}: its last stages cannot be run on their own", "model.trainable_stages=0")


def _remove_classifier(module: nn.Module, name: str) -> None:
    """Replace the last layer, which is linear or a convolution of 1 x 1, by the identity."""
    if hasattr(module, "reset_classifier"):
        module.reset_classifier(0)  # type: ignore[operator]
        return
    weighted = [(key, layer) for key, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    path, layer = weighted[-1] if weighted else ("", nn.Identity())
    if not isinstance(layer, nn.Linear) and getattr(layer, "kernel_size", None) != (1, 1):
        raise ConfigError(f"{name}: has no linear classifier to replace", "name another model.backbone")
    parent, _, key = path.rpartition(".")
    setattr(module.get_submodule(parent), key, nn.Identity())


def _split_after(module: nn.Module, layer: str) -> tuple[nn.Module, nn.Module] | None:
    """Return the parts before and after the output of a layer; None if the graph cannot be cut there."""
    try:
        whole = trace(module, {layer: CUT})
        traced = trace(module, {layer: CUT}, FEATURES)
    except (*TRACE_FAILURES, ValueError):
        return None
    trunk, tail = _part(whole, CUT), _part(traced, FEATURES, start=CUT)
    return None if tail is None or trunk is None else (trunk, tail)


def _use_defaults(graph: torch.fx.Graph) -> None:
    """Replace the inputs of a graph that have a default, such as an attention mask, by these."""
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.args]:

        def default_of(argument: torch.fx.Node, node: torch.fx.Node = node) -> Any:
            return node.args[0] if argument is node else argument

        for user in list(node.users):
            user.args = torch.fx.node.map_arg(user.args, default_of)
            user.kwargs = torch.fx.node.map_arg(user.kwargs, default_of)


def _part(traced: torch.fx.GraphModule, key: str, start: str | None = None) -> nn.Module | None:
    """Return the module that computes one output of a graph, from its output `start` if given; None if it cannot."""
    module = torch.fx.GraphModule(copy.deepcopy(traced), copy.deepcopy(traced.graph))
    graph = module.graph
    _use_defaults(graph)
    output = next(node for node in graph.nodes if node.op == "output")
    results = output.args[0]
    if start is not None:
        origin = results[start]
        with graph.inserting_before(next(iter(graph.nodes))):
            placeholder = graph.placeholder("maps")
        origin.replace_all_uses_with(placeholder, delete_user_cb=lambda user: user is not output)
        for node in [node for node in graph.nodes if node.target is torch._assert]:  # of the size of the images
            graph.erase_node(node)
    output.args = (results[key],)
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if not node.users:
            graph.erase_node(node)
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        return None  # a path from the images goes around the layer
    module.delete_all_unused_submodules()
    module.recompile()
    return module.eval().requires_grad_(False)
