"""Models by name: our own, `timm:NAME`, `torchvision:NAME`, and the user's `./file.py:Name`.

A builder's parameters `in_channels`, `image_size`, `num_classes` and `layers` come from the program, all others from
the YAML.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvlab import registry
from cvlab.config.schema import Registry
from cvlab.errors import ConfigError

MODELS = {
    "deep_convnet": "cvlab.experiments.classification.models.convnet:deep_convnet",
    "three_layer_convnet": "cvlab.experiments.classification.models.convnet:three_layer_convnet",
    "fc_net": "cvlab.experiments.classification.models.mlp:mlp",
    "api_barebones": "cvlab.experiments.classification.models.api_levels:ApiBarebones",
    "api_module": "cvlab.experiments.classification.models.api_levels:ApiModule",
    "api_sequential": "cvlab.experiments.classification.models.api_levels:api_sequential",
    "preact_resnet": "cvlab.experiments.classification.models.resnet:preact_resnet",
    "whiten_net": "cvlab.experiments.classification.models.whiten_net:whiten_net",
}
PREFIXES = {
    "timm": "cvlab.models.zoo:build_timm",
    "torchvision": "cvlab.models.zoo:build_torchvision",
}
SUPPLIED = frozenset({"in_channels", "image_size", "num_classes", "layers", "model_name"})


def get_builder(name: str, base: Path) -> Callable[..., Any]:
    """Return the builder of a model by its name, a user's file relative to `base`."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in PREFIXES:
        zoo: Callable[..., Any] = registry.import_name(PREFIXES[prefix])
        return functools.partial(zoo, model_name=rest)
    if registry.is_user_file(name):
        user: Callable[..., Any] = registry.import_user_object(name, base)
        return user
    if name not in MODELS:
        raise registry.unknown_name_error(
            "model", name, [*MODELS, *(f"{prefix}:NAME" for prefix in PREFIXES), "./file.py:Name"]
        )
    own: Callable[..., Any] = registry.import_name(MODELS[name])
    return own


def check_logits(model: nn.Module, name: str, in_channels: int, image_size: int, num_classes: int) -> None:
    """Raise ConfigError unless a model can be trained and maps two blank images to scores (2, num_classes) or more."""
    model.eval()
    with torch.no_grad():
        scores = model(torch.zeros(2, in_channels, image_size, image_size))
    model.train()
    found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != 2 or scores.shape[1] < num_classes:
        raise ConfigError(f"model {name}: two images give {found}, not scores (2, {num_classes})")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model {name}: has no weights to train")


TABLE = Registry("model", MODELS, SUPPLIED, get_builder)


def build(name: str, arguments: dict[str, Any], base: Path, **supplied: Any) -> nn.Module:
    """Build a model; of `supplied` (in_channels, image_size, num_classes, layers) it gets what its builder takes."""
    builder = get_builder(name, base)
    parameters = inspect.signature(builder).parameters
    chosen = {key: value for key, value in supplied.items() if key in parameters}
    if supplied.get("layers", nn) is not nn and "layers" not in parameters:
        raise ConfigError(f"model {name}: is not built from layers that are passed in", "use layers: torch")
    model = builder(**chosen, **arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model
