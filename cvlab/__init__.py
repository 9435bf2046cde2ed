"""cvlab: an experiment runner for computer vision, from the command line and from Python.

    run = cvlab.train("quickstart", {"optimizer.lr": 1e-2}, seed=1)
    run.metrics, run.summary, run.model(), run.predict("photo.jpg")
    cvlab.detect("photo.jpg").results

The names below are imported on first use, so that `import cvlab` stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvlab import errors
    from cvlab.api.handles import Result, Run, RunList
    from cvlab.api.library import load_run, lr, robustness, runs, summary, sweep, train
    from cvlab.api.library_photos import attack, caption, classify, classvis, detect, dream, look, saliency, style
    from cvlab.experiments.classification.data.images import ImageDataset
    from cvlab.ops.average_precision import Detections

__version__ = "0.1.0"
__all__ = [
    "Detections",
    "ImageDataset",
    "Result",
    "Run",
    "RunList",
    "__version__",
    "attack",
    "caption",
    "classify",
    "classvis",
    "detect",
    "dream",
    "errors",
    "load_run",
    "look",
    "lr",
    "robustness",
    "runs",
    "saliency",
    "style",
    "summary",
    "sweep",
    "train",
]
_PUBLIC = {
    "Detections": "cvlab.ops.average_precision",
    "ImageDataset": "cvlab.experiments.classification.data.images",
    **dict.fromkeys(("Result", "Run", "RunList"), "cvlab.api.handles"),
    **dict.fromkeys(("load_run", "lr", "robustness", "summary", "sweep", "train"), "cvlab.api.library"),
    **dict.fromkeys(("attack", "caption", "classify", "classvis", "detect"), "cvlab.api.library_photos"),
    **dict.fromkeys(("dream", "look", "saliency", "style"), "cvlab.api.library_photos"),
}
_MODULES = ("errors", "runs")  # `cvlab.runs` is a package that can be called, see there


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"cvlab.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cvlab' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """List the public names also before they are imported, for completion."""
    return sorted({*globals(), *__all__})
