"""Models of timm and torchvision, by `timm:NAME` and `torchvision:NAME`, without weights."""

import re
from typing import Any

from torch import nn

from cvlab import _compat, registry
from cvlab.errors import ConfigError

UNEXPECTED_KEY = re.compile(r"unexpected keyword argument '(\w+)'")


def build_timm(model_name: str, *, in_channels: int = 3, num_classes: int | None = 10, **options: Any) -> nn.Module:
    """Build a model of timm (Wightman, 2019) with random weights.

    Args:
        model_name: As `timm.list_models()` has it.
        in_channels: Channels of the images.
        num_classes: None: the model's own.
        options: Passed to `timm.create_model`.

    Returns:
        The model, from images (N, C, H, W) to logits.

    Raises:
        ConfigError: unknown name, or options that timm rejects.
    """
    timm = _compat.timm()
    if model_name.partition(".")[0] not in list_models("timm"):  # what follows the dot names the weights
        raise unknown_model("timm", model_name)
    return _call_builder(
        f"timm:{model_name}", timm.create_model, model_name, in_chans=in_channels, num_classes=num_classes, **options
    )


def build_torchvision(model_name: str, *, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build a model of torchvision with random weights.

    Args:
        model_name: As `torchvision.models.list_models()` has it.
        num_classes: Number of classes.
        options: Passed to the model's builder.

    Returns:
        The model, from images (N, 3, H, W) to logits.

    Raises:
        ConfigError: unknown name, or options that torchvision rejects.
    """
    models = _compat.torchvision().models
    if model_name not in list_models("torchvision"):
        raise unknown_model("torchvision", model_name)
    return _call_builder(f"torchvision:{model_name}", models.get_model, model_name, num_classes=num_classes, **options)


def list_models(library: str) -> list[str]:
    """Return the names of the classifiers of `timm` or `torchvision`."""
    if library == "timm":
        names: list[str] = _compat.timm().list_models()
    else:
        models = _compat.torchvision().models
        names = models.list_models(module=models)
    return names


def _call_builder(name: str, builder: Any, *args: Any, **options: Any) -> nn.Module:
    if options.get("pretrained"):
        raise ConfigError(f"model {name}: `pretrained` would fetch weights", "model.weights=auto uses fetched ones")
    try:
        model: nn.Module = builder(*args, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        key = UNEXPECTED_KEY.search(str(error))
        if key is not None:
            raise ConfigError(
                f"model {name}: it has no parameter {key[1]!r}", f"see the documentation of {name}"
            ) from error
        raise ConfigError(f"model {name}: {str(error).splitlines()[0]}") from error
    return model


def unknown_model(library: str, name: str) -> ConfigError:
    """Return the error of a name that `timm` or `torchvision` does not know, with the closest one that it does."""
    known = list_models(library)
    close = registry.closest_match(name, known)
    return ConfigError(
        f"unknown {library} model {name!r}",
        f"did you mean {close!r}?" if close else f"{len(known)} are known to {library}",
    )
