"""Names to objects: the only strings that point to higher layers.

A registry is a plain `dict[str, "module:Name"]` whose modules are imported on first use. A user's own object is
`./file.py:Name`. Nothing else can be imported from a configuration.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from cvlab.experiments.base import Experiment

EXPERIMENTS = {
    "adversarial_patch": "cvlab.experiments.adversarial.patch:PatchExperiment",
    "attack": "cvlab.experiments.adversarial.experiments:AttackExperiment",
    "caption": "cvlab.experiments.captioning.experiments:CaptionExperiment",
    "captioner": "cvlab.experiments.captioning.experiments:CaptionerExperiment",
    "class_visualization": "cvlab.experiments.interpretability.experiments:ClassVisualizationExperiment",
    "classify": "cvlab.experiments.classification.experiments:ClassifyExperiment",
    "classify_photos": "cvlab.experiments.classification.experiments:ClassifyPhotosExperiment",
    "detect": "cvlab.experiments.detection.experiments:DetectExperiment",
    "detector": "cvlab.experiments.detection.experiments:DetectorExperiment",
    "dream": "cvlab.experiments.interpretability.experiments:DreamExperiment",
    "fast_style": "cvlab.experiments.style.experiments:FastStyleExperiment",
    "feature_inversion": "cvlab.experiments.interpretability.experiments:FeatureInversionExperiment",
    "knn": "cvlab.experiments.classification.nearest_neighbors:NearestNeighborsExperiment",
    "look": "cvlab.experiments.interpretability.look:LookExperiment",
    "lr_range_test": "cvlab.experiments.common.lr_range_test:LrRangeTestExperiment",
    "robustness": "cvlab.experiments.adversarial.robustness:RobustnessExperiment",
    "saliency": "cvlab.experiments.interpretability.experiments:SaliencyExperiment",
    "style": "cvlab.experiments.style.experiments:StyleExperiment",
    "sweep": "cvlab.sweeps.experiment:SweepExperiment",
    "universal_perturbation": "cvlab.experiments.adversarial.universal:UniversalExperiment",
}


MAX_LISTED = 12  # names in a message


def closest_match(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, or None if none is close."""
    folded = {other.lower(): other for other in known}
    for other in folded:
        if _is_one_typo(name.lower(), other):
            return folded[other]
    matches = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def _is_one_typo(a: str, b: str) -> bool:
    """Return whether the words differ by one letter: removed, added, replaced, or swapped with the next."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:]
    return rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:] or swapped


def unknown_name_error(kind: str, name: str, known: Iterable[str], listing: str = "") -> ConfigError:
    """Return the error for an unknown name: the closest name, then all known ones.

    Args:
        kind: What has the name, in a word or two.
        name: The unknown name.
        known: The known names.
        listing: The command that lists them; if there are many, it is given instead of the names.
    """
    known = sorted(known)
    close = closest_match(name, known)
    quoted = [repr(other) if "," in other else other for other in known]
    question = f"did you mean {close!r}? " if close else ""
    if listing and len(known) > MAX_LISTED:
        similar = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        nearest = question or (f"similar: {', '.join(similar)}; " if similar else "")
        return ConfigError(f"unknown {kind} {name!r}", f"{nearest}`{listing}` lists all {len(known)}")
    return ConfigError(f"unknown {kind} {name!r}", f"{question}known: {', '.join(quoted)}")


def import_name(target: str) -> Any:
    """Import `module:Name` from one of the registries."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def get(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Return the object that is registered under `name`.

    Raises:
        ConfigError: if there is none, with the closest name.
    """
    if name not in table:
        raise unknown_name_error(kind, name, table)
    return import_name(table[name])


def is_user_file(name: str) -> bool:
    """Return whether a name refers to a user's file: `path/to/file.py:Name`."""
    return ".py:" in name


def import_user_object(name: str, base: Path) -> Any:
    """Import `file.py:Name`, the path relative to `base`; exceptions of the file itself are not caught.

    The file may import others of its folder, as it may when it is run as a script.

    Raises:
        ConfigError: if there is no such file or no such name in it.
    """
    file, _, attribute = name.rpartition(":")
    path = (base / file).resolve()
    if not path.is_file():
        raise ConfigError(f"{name}: no file {path}", "the path is relative to the configuration file")
    module_name = f"cvlab_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look their module up by name
    with _importing_from(path.parent):
        spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name_error(f"name in {path.name}", attribute, public)
    return getattr(module, attribute)


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported; forget them afterwards, for another folder may have the same names."""
    before, writes_no_bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # in a run directory it would be code that its signature does not have
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_no_bytecode
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(folder):
                del sys.modules[name]


def local_imports(path: Path) -> list[Path]:
    """Return the files beside a user's file that it imports, directly or indirectly, relative to its folder."""
    folder, todo, files = path.parent, [path], {path}
    while todo:
        for name in _imported_modules(todo.pop()):
            package = folder / name
            candidates = [
                folder / f"{name}.py",
                *(package.rglob("*.py") if (package / "__init__.py").is_file() else ()),
            ]
            new = {candidate for candidate in candidates if candidate.is_file()} - files
            files |= new
            todo += new
    return sorted(file.relative_to(folder) for file in files - {path})


def _imported_modules(path: Path) -> set[str]:
    """Return the first parts of the names of the modules that a file imports; none if it cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError):
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}


def experiment_names() -> list[str]:
    """Return the names of all experiments; none is imported."""
    return sorted(EXPERIMENTS)


def get_experiment(name: str) -> "Experiment[Any]":
    """Return the experiment called `name`.

    Raises:
        ConfigError: if there is none, with the closest name.
    """
    experiment: Experiment[Any] = get("experiment", name, EXPERIMENTS)()
    return experiment
