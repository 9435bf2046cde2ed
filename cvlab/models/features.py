"""Intermediate features of pretrained classifiers, by the names of their modules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from cvlab import registry
from cvlab.errors import ConfigError
from cvlab.models import graph
from cvlab.models.pretrained import PretrainedClassifier

PROBE_PX = 224
FALLBACK_STRIDES = (2, 4, 8, 16)  # of the style layers of a model that STYLE_LAYERS does not name


@dataclass(frozen=True)
class StyleLayers:
    """The layers whose Gram matrices are the style, and the one whose features are the content."""

    style: tuple[str, ...]
    content: str


EFFICIENTNET_LITE = StyleLayers(("blocks.0", "blocks.1", "blocks.3", "blocks.5"), "blocks.4")
STYLE_LAYERS = {  # VGG's are the paper's: relu1_1 to relu5_1, relu4_2; SqueezeNet 1.1's are those of EECS 498
    "efficientnet_lite0": EFFICIENTNET_LITE,
    "efficientnet_lite2": EFFICIENTNET_LITE,
    "torchvision:vgg16": StyleLayers(tuple(f"features.{k}" for k in (1, 6, 11, 18, 25)), "features.20"),
    "torchvision:vgg19": StyleLayers(tuple(f"features.{k}" for k in (1, 6, 11, 20, 29)), "features.22"),
    "torchvision:squeezenet1_0": StyleLayers(tuple(f"features.{k}" for k in (1, 4, 7, 9)), "features.5"),
    "torchvision:squeezenet1_1": StyleLayers(tuple(f"features.{k}" for k in (1, 4, 6, 7)), "features.3"),
}


class FeatureExtractor:
    """A classifier cut after the last of the named layers; gives the outputs of all of them.

    The model is traced with torch.fx, so that no layer behind the last named one is computed or exported. A model whose
    control flow cannot be traced is stopped after the last call of a named layer.

    Attributes:
        model: The classifier.
        names: The layers, without duplicates.
        module: The traced module, which shares the classifier's weights; from normalized images to a dictionary.
    """

    def __init__(self, model: PretrainedClassifier, names: Sequence[str]) -> None:
        """Trace a classifier.

        Args:
            model: The classifier. Its activations no longer work in place, which would overwrite a layer's output.
            names: Modules such as `blocks.3` or `features.7`.

        Raises:
            ConfigError: the model has no such layer, or does not compute it.
        """
        self.model, self.names = model, tuple(dict.fromkeys(names))
        modules = dict(model.module.model.named_modules())
        for name in self.names:
            if name not in modules or not name:
                raise registry.unknown_name_error("layer", name, _outer_modules(model.module.model))
        for module in modules.values():
            if getattr(module, "inplace", False):
                module.inplace = False
        self.module = _trace(model, self.names)

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Return the features (C, H, W) of an image (3, H, W) in [0, 1], by layer."""
        return {name: features[0] for name, features in self.batch(image[None]).items()}

    def batch(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of a batch.

        Args:
            images: (N, 3, H, W) in [0, 1].

        Returns:
            features (N, C, h, w) by layer.

        Raises:
            ConfigError: the images are too small for the model, or a layer's output is no feature map.
        """
        normalized = self.model.module.normalize(images.contiguous(memory_format=torch.channels_last))
        try:
            features: dict[str, Tensor] = self.module(normalized)
        except RuntimeError as error:
            if "size" not in str(error):
                raise
            height, width = images.shape[2:]
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{width} x {height} pixels do not fit {self.model.name}: {reason}", "try a larger size"
            ) from error
        for name in self.names:
            if not isinstance(features.get(name), Tensor) or features[name].ndim != 4:
                raise _no_feature_map(self.model, name)
        return features


class _Computed(Exception):  # noqa: N818 - ends a forward pass, is no error
    """All layers were computed; what follows is not needed."""


class _HookedFeatures(nn.Module):
    """The outputs of some layers of a model that cannot be traced, which is computed until it has called all of them.

    How often it calls them is counted once, with an image of the model's own size: what follows may take no other size.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], image: Tensor) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.num_calls = 0
        with torch.inference_mode():
            self._record(image)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self._record(images, self.num_calls)

    def _record(self, images: Tensor, num_calls: int | None = None) -> dict[str, Tensor]:
        """Return the last outputs of the layers after a number of calls; None: count the calls."""
        features: dict[str, Tensor] = {}
        count = 0

        def hook_of(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                nonlocal count
                features[name] = output
                count += 1
                if count == num_calls:
                    raise _Computed

            return hook

        modules = dict(self.model.named_modules())
        handles = [modules[name].register_forward_hook(hook_of(name)) for name in self.names]
        try:
            self.model(images)
        except _Computed:
            pass
        finally:
            for handle in handles:
                handle.remove()
        self.num_calls = count
        return features


def _trace(model: PretrainedClassifier, names: Sequence[str]) -> nn.Module:
    """Return a model cut after the last of some layers; with hooks if its control flow depends on its input."""
    try:
        traced: nn.Module = graph.trace(model.module.model, {name: name for name in names})
    except graph.TRACE_FAILURES:
        size_px = model.transform.size_px
        device = next(model.module.parameters()).device
        image = model.module.normalize(torch.full((1, 3, size_px, size_px), 0.5, device=device))
        traced = _HookedFeatures(model.module.model, names, image)
    except ValueError as error:
        missing = next((name for name in names if f"'{name}'" in str(error)), names[0])
        raise _no_feature_map(model, missing) from error
    return traced.eval()


def _no_feature_map(model: PretrainedClassifier, name: str) -> ConfigError:
    return ConfigError(f"layer {name!r} of {model.name} gives no map (N, C, H, W)", "name another one")


def _outer_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the two outer levels by name; those of each part if it is split into trunk and tail.

    A part that torch.fx has cut calls no container of modules, so all of its modules are returned.
    """
    parts = [(f"{name}.", child) for name, child in network.named_children() if name in ("trunk", "tail")]
    outer: dict[str, nn.Module] = {}
    for prefix, part in parts or [("", network)]:
        levels = math.inf if isinstance(part, torch.fx.GraphModule) else 2
        outer |= {prefix + name: child for name, child in part.named_modules() if name and name.count(".") < levels}
    return outer


def last_layer_by_stride(model: PretrainedClassifier) -> dict[int, str]:
    """Return the last layer of each stride, among the outer modules of a model.

    Args:
        model: The classifier.

    Returns:
        names by stride in pixels, ascending.
    """
    last: dict[int, str] = {}
    handles = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[0] == 1 and output.shape[2] > 1:
                last[PROBE_PX // output.shape[2]] = name

        return hook

    try:
        handles = [m.register_forward_hook(record(name)) for name, m in _outer_modules(model.module.model).items()]
        with torch.inference_mode():
            model.module(torch.full((1, 3, PROBE_PX, PROBE_PX), 0.5, device=model.module.scale.device))
    except (AssertionError, RuntimeError, ValueError):  # the last layers may take another size only
        if not last:
            raise
    finally:
        for handle in handles:
            handle.remove()
    return last


def default_style_layers(model: PretrainedClassifier) -> StyleLayers:
    """Return the style and content layers of a model: those of STYLE_LAYERS, else the last ones of each stride.

    Args:
        model: The classifier.

    Returns:
        The layers.

    Raises:
        ConfigError: the model has no feature maps of several strides.
    """
    if model.name in STYLE_LAYERS:
        return STYLE_LAYERS[model.name]
    last = last_layer_by_stride(model)
    chosen = tuple(last[stride] for stride in FALLBACK_STRIDES if stride in last)
    if len(chosen) < 2:
        raise ConfigError(f"{model.name} has no maps of several resolutions", "name style_layers and content_layer")
    return StyleLayers(chosen, chosen[-1])
