"""Which layers of a pretrained classifier give its feature maps at each stride."""

from collections.abc import Sequence

from cvlab.errors import ConfigError
from cvlab.models import features, names
from cvlab.models.pretrained import PretrainedClassifier

LAYERS_BY_STRIDE = {  # the last layer of each stride
    name: {4: "blocks.1", 8: "blocks.2", 16: "blocks.4", 32: "blocks.6"} for name in names.BY_PIP
} | {names.NANODET: {4: "stages.0", 8: "stages.1", 16: "stages.2", 32: "stages.3"}}
LAST_LAYER = dict.fromkeys(names.BY_PIP, "bn2")  # 1280 channels at stride 32, as the course's MobileNetV2 has them
PROBE_PX = 64  # side of the image that tells the number of channels


def feature_layers(model: PretrainedClassifier, strides: Sequence[int], is_last: bool = False) -> list[str]:
    """Return the layers that give a backbone's feature maps.

    Args:
        model: The backbone.
        strides: In pixels.
        is_last: Whether the very last feature map is meant, if LAST_LAYER names it.

    Returns:
        names of modules, one for each stride.

    Raises:
        ConfigError: the backbone has no feature map of a stride.
    """
    if is_last and model.name in LAST_LAYER:
        return [LAST_LAYER[model.name]]
    layers = LAYERS_BY_STRIDE.get(model.name) or features.last_layer_by_stride(model)
    missing = [stride for stride in strides if stride not in layers]
    if missing:
        raise ConfigError(f"{model.name} has no maps of stride {missing[0]}", f"known: {', '.join(map(str, layers))}")
    return [layers[stride] for stride in strides]
