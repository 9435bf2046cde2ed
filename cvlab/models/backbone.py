"""Which layers of a pretrained classifier give its feature maps at each stride."""

from collections.abc import Sequence

from cvlab.errors import ConfigError
from cvlab.models import features, pretrained
from cvlab.models.pretrained import PretrainedClassifier

LAYERS_BY_STRIDE = {
    pretrained.DEFAULT_MODEL: {4: "blocks.1", 8: "blocks.2", 16: "blocks.4", 32: "blocks.6"}
}  # the last layer of each stride


LAST_LAYER = {pretrained.DEFAULT_MODEL: "bn2"}  # 1280 channels at stride 32, as the course's MobileNetV2 has them


PROBE_PX = 64


def feature_layers(net: PretrainedClassifier, strides: Sequence[int], is_last: bool = False) -> list[str]:
    """Return the names of the backbone's layers of some strides. ConfigError where it has none such."""
    if is_last and net.name in LAST_LAYER:
        return [LAST_LAYER[net.name]]
    known = LAYERS_BY_STRIDE.get(net.name) or features.last_layer_by_stride(net)
    missing = [stride for stride in strides if stride not in known]
    if missing:
        raise ConfigError(f"{net.name} has no maps of stride {missing[0]}", f"known: {', '.join(map(str, known))}")
    return [known[stride] for stride in strides]
