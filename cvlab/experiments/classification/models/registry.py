"""Image classifiers by name: cvlab's own, `timm:NAME`, `torchvision:NAME`, and the user's `./file.py:Name`.

A builder's parameters `in_channels`, `image_size`, `num_classes` and `layers` are filled in by cvlab; all others are
keys of the `model` block.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab import registry
from cvlab.config.schema import Registry
from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


MODELS = {
    "deep_convnet": "cvlab.experiments.classification.models.convnet:deep_convnet",
    "three_layer_convnet": "cvlab.experiments.classification.models.convnet:three_layer_convnet",
    "fc_net": "cvlab.experiments.classification.models.mlp:mlp",
    "api_barebones": "cvlab.experiments.classification.models.api_levels:ApiBarebones",
    "api_module": "cvlab.experiments.classification.models.api_levels:ApiModule",
    "api_sequential": "cvlab.experiments.classification.models.api_levels:api_sequential",
    "preact_resnet": "cvlab.experiments.classification.models.resnet:preact_resnet",
    "pretrained": "cvlab.experiments.classification.models.transfer:pretrained_classifier",
    "efficientnet_lite0": "cvlab.experiments.classification.models.finetune:efficientnet_lite0",
    "efficientnet_lite2": "cvlab.experiments.classification.models.finetune:efficientnet_lite2",
    "whiten_net": "cvlab.experiments.classification.models.whiten_net:whiten_net",
}
PREFIXES = {
    "timm": "cvlab.experiments.classification.models.finetune:timm_model",
    "torchvision": "cvlab.experiments.classification.models.finetune:torchvision_model",
}
INJECTED = frozenset({"in_channels", "image_size", "num_classes", "layers", "model_name"})


def get_builder(name: str, base: Path) -> Callable[..., Any]:
    """Return the builder of the model called `name`; a user's file is relative to `base`. Raises ConfigError."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in PREFIXES:
        zoo: Callable[..., Any] = registry.import_name(PREFIXES[prefix])
        return functools.partial(zoo, model_name=rest)
    if registry.is_user_file(name):
        user_builder: Callable[..., Any] = registry.import_user_object(name, base)
        return user_builder
    if name not in MODELS:
        raise _unknown_model(name)
    builder: Callable[..., Any] = registry.import_name(MODELS[name])
    return builder


def _unknown_model(name: str) -> ConfigError:
    known = [*MODELS, *(f"{prefix}:NAME" for prefix in PREFIXES), "./file.py:Name"]
    error = registry.unknown_name_error("model", name, known)
    if registry.closest_match(name, MODELS) is None:
        from cvlab.models import zoo

        elsewhere = [prefix for prefix in PREFIXES if name in zoo.list_models(prefix)]
        if elsewhere:
            return ConfigError(
                error.message, f"did you mean {' or '.join(f'{prefix}:{name}' for prefix in elsewhere)}?"
            )
    return error


TABLE = Registry("model", MODELS, INJECTED, get_builder)


def build(name: str, arguments: dict[str, Any], base: Path, **injected: Any) -> "nn.Module":
    """Build a model.

    Args:
        name: The name of the model.
        arguments: Keys of the `model` block.
        base: The folder that paths to user files are relative to.
        **injected: in_channels, image_size, num_classes and layers; those that the builder does not take are left out.

    Returns:
        The model.

    Raises:
        ConfigError: The name is unknown, or the builder does not return a module.
    """
    from torch import nn

    builder = get_builder(name, base)
    parameters = inspect.signature(builder).parameters
    chosen = {key: value for key, value in injected.items() if key in parameters}
    if injected.get("layers", nn) is not nn and "layers" not in parameters:
        raise ConfigError(f"model {name}: does not take `layers`", "use layers: torch")
    model = builder(**chosen, **arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model
