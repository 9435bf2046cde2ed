"""What a net sees on the way: the outputs of named layers, computed no further than the deepest of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cvlab import registry
from cvlab.errors import ConfigError
from cvlab.models.pretrained import PretrainedClassifier

FALLBACK_STRIDES = (2, 4, 8, 16)  # of the layers that stand for a net which has no row in DEFAULTS


@dataclass(frozen=True)
class StyleLayers:
    """Layers by name: those whose Gram matrices are the style, and the one that holds the content."""

    style: tuple[str, ...]
    content: str


STYLE_LAYERS = {  # VGG's are the paper's: relu1_1 to relu5_1, relu4_2; SqueezeNet 1.1's are those of EECS 498
    "efficientnet_lite0": StyleLayers(("blocks.0", "blocks.1", "blocks.3", "blocks.5"), "blocks.4"),
    "torchvision:vgg16": StyleLayers(tuple(f"features.{k}" for k in (1, 6, 11, 18, 25)), "features.20"),
    "torchvision:vgg19": StyleLayers(tuple(f"features.{k}" for k in (1, 6, 11, 20, 29)), "features.22"),
    "torchvision:squeezenet1_0": StyleLayers(tuple(f"features.{k}" for k in (1, 4, 7, 9)), "features.5"),
    "torchvision:squeezenet1_1": StyleLayers(tuple(f"features.{k}" for k in (1, 4, 6, 7)), "features.3"),
}


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass
    pass


class FeatureExtractor:
    """The outputs of layers of a net, by the names of its modules, such as `blocks.3` or `features.7`."""

    def __init__(self, model: PretrainedClassifier, names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(dict.fromkeys(names))
        known = dict(model.module.model.named_modules())
        for name in self.names:
            if name not in known or not name:
                raise registry.unknown_name_error("layer", name, [key for key in known if key and key.count(".") < 2])
        self.modules = [known[name] for name in self.names]
        for module in model.module.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]  # it would change an output that is kept

    def __call__(self, picture: Tensor) -> dict[str, Tensor]:
        """Return the outputs (C, H, W) for a picture (3, H, W) in [0, 1], by layer."""
        return {name: maps[0] for name, maps in self.batch(picture[None]).items()}

    def batch(self, pictures: Tensor, to_end: bool = False) -> dict[str, Tensor]:
        """Return the outputs (N, C, H, W) for pictures (N, 3, H, W) in [0, 1], by layer.

        The net stops after the last of them, or goes `to_end`: whoever traces it cannot follow the short cut.
        ConfigError for a layer that gives no such maps, or that the net does not come by.
        """
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[name] = output
                if len(found) == len(self.names) and not to_end:
                    raise _Enough

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in zip(self.names, self.modules, strict=True)]
        try:
            self.model.module(pictures.contiguous(memory_format=torch.channels_last))
        except _Enough:
            pass
        except RuntimeError as error:  # a picture too small to be pooled so often
            if len(found) == len(self.names) or "size" not in str(error):
                raise
            side = min(pictures.shape[2:])
            raise ConfigError(f"{side} pixels are too few for {self.model.name}: {error}", "a larger size") from error
        finally:
            for handle in handles:
                handle.remove()
        for name in self.names:
            if name not in found or not isinstance(found[name], Tensor) or found[name].ndim != 4:
                raise ConfigError(f"layer {name!r} of {self.model.name} gives no map (N, C, H, W)", "name another one")
        return found

    def bytes_for_gradient(self, height: int, width: int) -> float:
        """Estimate the memory of a forward and a backward pass over a picture: what autograd keeps, and what passes.

        Measured on a small picture; what is kept grows with the pixels.
        """
        side = 128
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        device = self.model.module.scale.device
        picture = torch.rand(3, side, side, device=device).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            held = self(picture)
        weights = {p.untyped_storage().data_ptr() for p in self.model.module.parameters()}
        sizes = [size for place, size in kept.items() if place not in weights]
        del held
        return (sum(sizes) + 3 * max(sizes)) * height * width / side**2


def last_layer_by_stride(model: PretrainedClassifier) -> dict[int, str]:
    """Return the last layer, of those near the top of the net, for each of its resolutions, by stride."""
    side = 224
    last: dict[int, str] = {}
    handles = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[0] == 1 and output.shape[2] > 1:
                last[side // output.shape[2]] = name

        return hook

    inner = [(name, module) for name, module in model.module.model.named_modules() if name and name.count(".") < 2]
    try:
        handles = [module.register_forward_hook(note(name)) for name, module in inner]
        with torch.inference_mode():
            model.module(torch.full((1, 3, side, side), 0.5, device=model.module.scale.device))
    finally:
        for handle in handles:
            handle.remove()
    return last


def default_style_layers(model: PretrainedClassifier) -> StyleLayers:
    """Return the layers that a net's family is known to paint well with, else the last ones of each resolution."""
    if model.name in STYLE_LAYERS:
        return STYLE_LAYERS[model.name]
    last = last_layer_by_stride(model)
    chosen = tuple(last[stride] for stride in FALLBACK_STRIDES if stride in last)
    if len(chosen) < 2:
        raise ConfigError(f"{model.name} has no maps of several resolutions", "name style_layers and content_layer")
    return StyleLayers(chosen, chosen[-1])
