"""Names of pretrained models: those whose weights come by pip or are bundled, `timm:NAME`, `torchvision:NAME`."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from cvlab import registry

DEFAULT_MODEL = "efficientnet_lite0"
BY_PIP = {  # name -> extra of pyproject.toml that installs the package with its weights; "": always installed
    DEFAULT_MODEL: "",
    "efficientnet_lite2": "lite2",
}
NANODET = "nanodet_g"  # trained for detection on COCO, bundled; a backbone of detectors and captioners
PREFIXES = ("timm", "torchvision")
AUTO = "auto"  # for a file with weights: those that are found on this machine


def check_name(name: str) -> None:
    """Raise ConfigError unless a name has one of the forms that `pretrained.build` accepts."""
    prefix, colon, rest = name.partition(":")
    if name not in (*BY_PIP, NANODET) and not (colon and prefix in PREFIXES and rest):
        raise registry.unknown_name_error("model", name, [*BY_PIP, NANODET, *(f"{prefix}:NAME" for prefix in PREFIXES)])


def _absolute(path: str) -> str:
    return path if path == AUTO else os.path.abspath(Path(path).expanduser())


WeightsFile = Annotated[str, AfterValidator(_absolute)]
