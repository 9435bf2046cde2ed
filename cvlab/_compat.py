"""The only place that imports torchvision and timm, and that works around what torch does.

With a CPU build of torch and the registry's build of torchvision, `import torchvision` raises `RuntimeError: operator
torchvision::nms does not exist`: its C++ operators were built against another torch. Declaring the two operators that
torchvision registers fake implementations for lets it import; models, transforms and datasets then work. cvlab's own
`ops` never need torchvision's operators.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: "list[torch.library.Library]" = []  # a declaration lives as long as its library object


@functools.cache
def torchvision() -> ModuleType:
    """Import torchvision, with its operators declared where its C++ library cannot be loaded."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    return importlib.import_module("torchvision")


@functools.cache
def transforms() -> ModuleType:
    """Import torchvision's transforms of tensors and boxes, `torchvision.transforms.v2`."""
    torchvision()
    return importlib.import_module("torchvision.transforms.v2")


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for signature in SIGNATURES:
        library.define(signature)
    _libraries.append(library)


@functools.cache
def timm() -> ModuleType:
    """Import timm, which imports torchvision."""
    torchvision()
    return importlib.import_module("timm")


def timm_optimizers() -> ModuleType:
    """Import the optimizers of timm, `timm.optim`."""
    timm()
    return importlib.import_module("timm.optim")


def timm_text(name: str) -> str:
    """Read one of the lists of classes that come with timm, without importing it."""
    return (_folder("timm") / "data" / "_info" / name).read_text(encoding="utf-8")


def sample_photo() -> Path:
    """Return the photo that comes with matplotlib: Grace Hopper in uniform, 512 x 600, in the public domain."""
    return _folder("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent


def skip_dynamo() -> None:
    """Keep torch's optimizers from importing the compiler, which takes a second and compiles nothing here.

    Methods that `torch._disable_dynamo` wraps look for an attribute that says how to call them without the compiler;
    where the compiler is not loaded that is the method itself.
    """
    from torch.optim import Optimizer

    if "torch._dynamo" in sys.modules:
        return
    for method in vars(Optimizer).values():
        function = getattr(method, "__wrapped__", None)
        if function is not None and getattr(method, "__globals__", {}).get("__name__") == "torch._compile":
            setattr(function, "__dynamo_disable", function)


def optimizer_step(optimizer: "torch.optim.Optimizer") -> None:
    """Update the weights as `optimizer.step()` does, without the wrapper that imports the compiler.

    Hooks of the optimizer are not called.
    """
    import torch

    name = f"Optimizer.step#{type(optimizer).__name__}.step"  # as torch names it in profiles
    with torch.no_grad(), torch.autograd.profiler.record_function(name):
        inspect.unwrap(type(optimizer).step)(optimizer)
