"""Names of ImageNet-pretrained models: `efficientnet_lite0`, `timm:NAME`, `torchvision:NAME`."""

from cvlab import registry

DEFAULT_MODEL = "efficientnet_lite0"
PREFIXES = ("timm", "torchvision")


def check_name(name: str) -> None:
    """Raise ConfigError unless a name has one of the forms that `pretrained.build` accepts."""
    prefix, colon, rest = name.partition(":")
    if name != DEFAULT_MODEL and not (colon and prefix in PREFIXES and rest):
        raise registry.unknown_name_error("model", name, [DEFAULT_MODEL, *(f"{prefix}:NAME" for prefix in PREFIXES)])
