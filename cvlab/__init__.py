"""cvlab: a command-line experiment runner for computer vision.

The names below are for users' own files. They are imported on first use, so that `import cvlab` stays quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvlab.experiments.classification.data.images import ImageDataset
    from cvlab.ops.average_precision import Detections

__version__ = "0.1.0"
__all__ = ["Detections", "ImageDataset", "__version__"]
_PUBLIC = {
    "Detections": "cvlab.ops.average_precision:Detections",
    "ImageDataset": "cvlab.experiments.classification.data.images:ImageDataset",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cvlab' has no attribute {name!r}")
    from cvlab.registry import import_name

    return import_name(_PUBLIC[name])
