"""Models of timm and torchvision as they are trained here: from random or pretrained weights, as a whole or in part."""

from typing import Annotated, Any

from annotated_types import Gt, Le
from torch import nn

from cvlab import _compat
from cvlab.config.schema import NonNegativeInt
from cvlab.errors import ConfigError
from cvlab.models import pretrained, zoo
from cvlab.models.efficientnet import EfficientNetLite
from cvlab.models.names import AUTO, WeightsFile
from cvlab.models.split import stages

LayerDecay = Annotated[float, Gt(0), Le(1)]


def timm_model(
    model_name: str,
    weights: WeightsFile | None = None,
    freeze: NonNegativeInt = 0,
    layer_decay: LayerDecay = 1.0,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    **options: Any,
) -> nn.Module:
    """Build a model of timm (Wightman, 2019).

    Args:
        model_name: As `timm.list_models()` has it.
        weights: A file with pretrained weights, or `auto`: those that were fetched; None: random weights.
        freeze: Number of stages from the input on that are not trained, BatchNorm statistics included.
        layer_decay: The learning rate of each stage as a fraction of that of the next one.
        in_channels: C of the images.
        num_classes: Number of classes.
        options: Passed to `timm.create_model`.

    Returns:
        A model from images (N, C, H, W) to logits (N, num_classes).

    Raises:
        ConfigError: Unknown name, or options that timm rejects.
        DataError: The weights are missing, damaged or not of this model.

    References:
        Clark et al., 2020 (ELECTRA), section 3.2 and table 6: layer-wise learning rate decay.
    """
    model = zoo.build_timm(model_name, in_channels=in_channels, num_classes=num_classes, **options)
    return _prepare(model, f"timm:{model_name}", weights, freeze, layer_decay)


def torchvision_model(
    model_name: str,
    weights: WeightsFile | None = None,
    freeze: NonNegativeInt = 0,
    layer_decay: LayerDecay = 1.0,
    *,
    num_classes: int = 10,
    **options: Any,
) -> nn.Module:
    """Build a model of torchvision for images (N, 3, H, W); the arguments are those of `timm_model`."""
    model = zoo.build_torchvision(model_name, num_classes=num_classes, **options)
    return _prepare(model, f"torchvision:{model_name}", weights, freeze, layer_decay)


def efficientnet_lite0(
    weights: WeightsFile | None = AUTO,
    freeze: NonNegativeInt = 0,
    layer_decay: LayerDecay = 1.0,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Build EfficientNet-Lite0 (Tan and Le, 2019), whose weights are bundled; see `timm_model`."""
    return _efficientnet("efficientnet_lite0", weights, freeze, layer_decay, in_channels, num_classes)


def efficientnet_lite2(
    weights: WeightsFile | None = AUTO,
    freeze: NonNegativeInt = 0,
    layer_decay: LayerDecay = 1.0,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Build EfficientNet-Lite2 (Tan and Le, 2019), whose weights are the extra `lite2`; see `timm_model`."""
    return _efficientnet("efficientnet_lite2", weights, freeze, layer_decay, in_channels, num_classes)


def _efficientnet(
    name: str, weights: str | None, freeze: int, layer_decay: float, in_channels: int, num_classes: int
) -> nn.Module:
    model = EfficientNetLite(name, num_classes, in_channels)
    return _prepare(model, name, weights, freeze, layer_decay)


def _prepare(model: nn.Module, name: str, weights: str | None, freeze: int, layer_decay: float) -> nn.Module:
    classifiers = _classifiers(model)
    if weights is not None:
        pretrained.load_weights(model, name, weights, skip=classifiers)
    groups = _stages(model, classifiers)
    if freeze > len(groups):
        raise ConfigError(f"model.freeze {freeze}: {name} has {len(groups)} stages", f"at most {len(groups)}")
    if layer_decay < 1:
        depths = {f"{key}.": len(groups) - index for index, group in enumerate(groups) for key in group}
        inputs = {key: len(groups) for key, _ in model.named_parameters(recurse=False)}
        factors = {prefix: layer_decay**depth for prefix, depth in (depths | inputs).items()}
        model.lr_factors = factors  # type: ignore[assignment]
    if freeze:
        _compat.timm().utils.freeze(model, [key for group in groups[:freeze] for key in group])
        for parameter in model.parameters(recurse=False):
            parameter.requires_grad_(False)
    return model


def _stages(model: nn.Module, classifiers: tuple[str, ...]) -> list[list[str]]:
    """Return the names of the modules of each stage; a normalization belongs to the stage before it.

    Parameters of the model itself, such as position embeddings, belong to the first stage.
    """
    groups: list[list[str]] = []
    for name in stages(model):
        if name.startswith(classifiers):
            continue
        if groups and "Norm" in type(model.get_submodule(name)).__name__:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's classifiers: what timm says, else its last layer with weights."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if names:
        return (names,) if isinstance(names, str) else tuple(names)
    weighted = [key for key, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return (weighted[-1],) if weighted else ()
