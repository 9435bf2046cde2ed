"""Intermediate features of pretrained classifiers, by the names of their modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
    control flow cannot be traced is computed to its end.

    Attributes:
        model: the classifier.
        names: the layers, without duplicates.
        module: the traced module, which shares the classifier's weights; from normalized images to a dictionary.
    """

    def __init__(self, model: PretrainedClassifier, names: Sequence[str]) -> None:
        """Trace a classifier.

        Args:
            model: the classifier. Its activations no longer work in place, which would overwrite a layer's output.
            names: modules such as `blocks.3` or `features.7`.

        Raises:
            ConfigError: the model has no such layer, or does not compute it.
        """
        self.model, self.names = model, tuple(dict.fromkeys(names))
        modules = dict(model.module.model.named_modules())
        for name in self.names:
            if name not in modules or not name:
                shown = [key for key in modules if key and key.count(".") < 2]
                raise registry.unknown_name_error("layer", name, shown)
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
            side = min(images.shape[2:])
            raise ConfigError(f"{side} pixels are too few for {self.model.name}: {error}", "a larger size") from error
        for name in self.names:
            if not isinstance(features.get(name), Tensor) or features[name].ndim != 4:
                raise _no_feature_map(self.model, name)
        return features


class _HookedFeatures(nn.Module):
    """The outputs of some layers of a model that cannot be traced, which is therefore computed to its end."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._features: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for name in names:
            modules[name].register_forward_hook(self._record(name))

    def _record(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._features[name] = output

        return hook

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self._features = {}
        self.model(images)
        return self._features


def _trace(model: PretrainedClassifier, names: Sequence[str]) -> nn.Module:
    """Return a model cut after the last of some layers; with hooks if its control flow depends on its input."""
    try:
        traced: nn.Module = graph.trace(model.module.model, {name: name for name in names})
    except graph.TRACE_FAILURES:
        traced = _HookedFeatures(model.module.model, names)
    except ValueError as error:
        missing = next((name for name in names if f"'{name}'" in str(error)), names[0])
        raise _no_feature_map(model, missing) from error
    return traced.eval()


def _no_feature_map(model: PretrainedClassifier, name: str) -> ConfigError:
    return ConfigError(f"layer {name!r} of {model.name} gives no map (N, C, H, W)", "name another one")


def last_layer_by_stride(model: PretrainedClassifier) -> dict[int, str]:
    """Return the last layer of each stride, among the modules of the two outer levels of a model.

    Args:
        model: the classifier.

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

    outer = [(name, module) for name, module in model.module.model.named_modules() if name and name.count(".") < 2]
    try:
        handles = [module.register_forward_hook(record(name)) for name, module in outer]
        with torch.inference_mode():
            model.module(torch.full((1, 3, PROBE_PX, PROBE_PX), 0.5, device=model.module.scale.device))
    finally:
        for handle in handles:
            handle.remove()
    return last


def default_style_layers(model: PretrainedClassifier) -> StyleLayers:
    """Return the style and content layers of a model: those of STYLE_LAYERS, else the last ones of each stride.

    Args:
        model: the classifier.

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
