"""What the listing commands print, as plain dictionaries."""

from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.data import datasets
from cvlab.errors import DataError
from cvlab.runs.find import read_config
from cvlab.storage.cache import data_root

Row = dict[str, Any]


def show(path: Path) -> Row:
    """Return one run: status, configuration, metrics, expectations, files."""
    from cvlab.api import run

    return {**run.result(path), "ok": True, "config": read_config(path)}


def shipped() -> list[Row]:
    """Return the shipped configurations with the first line of their header."""
    from cvlab.config import loading

    rows = []
    for name in loading.shipped_names():
        text = (loading.shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        first = next((line for line in text.splitlines() if line.startswith("#")), "#")
        rows.append({"name": name, "shows": first.lstrip("# ").removeprefix("Shows: ")})
    return rows


def experiment_lines() -> dict[str, str]:
    """Return each experiment with the first line of its docstring."""
    return {
        name: (registry.get_experiment(name).__doc__ or "").partition("\n")[0] for name in registry.experiment_names()
    }


def model_lines() -> list[Row]:
    """Return each model with the keys that a YAML file may set."""
    from cvlab.experiments.classification.models import registry as model_registry

    rows = []
    for name in model_registry.MODELS:
        config = model_registry.TABLE.schema(name, Path())
        keys = [key if info.is_required() else f"{key}={info.default}" for key, info in config.model_fields.items()]
        rows.append({"name": name, "keys": ", ".join(keys[1:]), "summary": config.__doc__})
    rows += [
        {"name": f"{p}:NAME", "keys": "those of its builder", "summary": f"any model of {p}"}
        for p in model_registry.PREFIXES
    ]
    return [*rows, {"name": "./file.py:Name", "keys": "its own", "summary": "your own class or function"}]


def data_lines() -> list[Row]:
    """Return each data set with its state."""
    from cvlab.data import descriptions

    rows = []
    for name in datasets.DATASETS:
        about = descriptions.get(name)
        state = about.state(data_root())
        rows.append({"name": name, "state": state, "summary": about.summary, "license": about.license})
    return rows


def fetch(name: str, origin: Path | None) -> Row:
    """Download a data set, or take it from a file or folder, and check it.

    Args:
        name: The data set.
        origin: The file or folder; None to download it.

    Raises:
        DataError: It cannot be downloaded, or its files are not those expected.
    """
    from cvlab.storage import download

    source, root = datasets.get(name), data_root()
    if source.fetch is not None and (origin is not None or not _is_intact(source, root)):
        if origin is None and not download.is_online():
            raise DataError(f"{name}: CVLAB_OFFLINE is set", "unset it, or use --from FILE")
        source.fetch(root, origin, True)
    elif source.is_builtin:
        source.load(root)
    return {"ok": True, "name": name, "root": str(root), "detail": _check_all(name, root)}


def _check_all(name: str, root: Path) -> str:
    """Check a data set as each of its kinds. Raises DataError."""
    return "; ".join(dict.fromkeys(source.check(root) for source in datasets.get_all(name)))


def _is_intact(source: datasets.AnySource, root: Path) -> bool:
    if not source.ready(root):
        return False
    try:
        _check_all(source.name, root)
    except DataError as error:
        console.info(f"{error.message}; downloading it again")
        return False
    return True


def check(name: str | None) -> Row:
    """Compare a data set with its checksums, or all that are on the disk; return a description by name."""
    root = data_root()
    names = [name] if name else [each for each in datasets.DATASETS if datasets.get(each).ready(root)]
    return {each: _check_all(each, root) for each in names}
