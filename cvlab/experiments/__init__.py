"""One file per kind of job; its name is its file name. Each has a docstring, `class Config` and `run(config, out)`."""

import importlib
import pkgutil
from types import ModuleType

from cvlab import lookup


def names() -> list[str]:
    """Return the names of all experiments, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """Import the experiment called `name`; ConfigError with the nearest name otherwise."""
    if name not in names():
        raise lookup.unknown("experiment", name, names())
    return importlib.import_module(f"{__name__}.{name}")
