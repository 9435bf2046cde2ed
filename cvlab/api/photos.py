"""The verbs on photos: each runs its shipped configuration with the keys that the caller changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.api import run
from cvlab.config import loading
from cvlab.config.overrides import to_texts
from cvlab.config.strict_yaml import Document
from cvlab.data import photo_paths
from cvlab.data.resolve import DownloadPolicy
from cvlab.errors import ConfigError
from cvlab.experiments.adversarial.config import CORRUPTIONS
from cvlab.experiments.common import run_classifier
from cvlab.runs import trust

STYLE = "style"  # the configuration, and what the names of its presets begin with
FAST_STYLE = "style_fast"
BUNDLED_DETECTOR_NAMES = ("yolo", "everyday", "faster_rcnn", "yolov3_tiny")  # that `cvlab saliency --model` explains
PHOTO_SET_METHODS = {"universal": "universal_perturbation", "patch": "adversarial_patch"}  # of `attack`
Values = dict[str, Any]  # of configuration keys; None: not given


def load(name: str, values: Mapping[str, Any], overrides: Sequence[str]) -> loading.Loaded:
    """Return a shipped configuration with `values` of its keys, those that are None left out, and overrides.

    The expectations of the shipped configuration are those of its own photos, so they are left out.

    Raises:
        ConfigError: With all problems.
    """
    texts = to_texts({key: value for key, value in values.items() if value is not None})
    path = loading.shipped_folder() / f"{name}.yaml"
    # the shipped attack has a target class
    without_target = ["target=null"] if name == "attack" and values.get("target") is None else []
    return loading.load(str(path), ["expect=[]", *without_target, *texts, *overrides])


def start(loaded: loading.Loaded, root: Path) -> run.Result:
    """Run such a configuration in a new run directory below `root`; see `api.run.start`."""
    return run.start(loaded, DownloadPolicy(True, False, False), root)


def require_photos(images: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise ConfigError unless a photo is named, DataError if none of those that are named exists."""
    if not images and not any(text.startswith("images=") for text in overrides):
        raise ConfigError("no photo is named", "give files, folders or patterns, or `sample` for a bundled photo")
    photo_paths.require_any(images)


def require_style_images(images: Sequence[str], masks: Sequence[str]) -> None:
    """Raise ConfigError unless a photo and a style image are named, DataError if one of the files does not exist."""
    if len(images) < 2:
        missing = "photo is named" if not images else "style is named"
        raise ConfigError(f"no {missing}", "`cvlab style photo.jpg painting.jpg`; `sample` and `whirls` are bundled")
    photo_paths.require_all([*images, *masks])


def resolve_model(model: str | None, root: Path, is_trusted: bool) -> str | None:
    """Return the name of a pretrained model, or the absolute path of the run below `root` that is meant.

    Raises:
        ConfigError: The model is unknown.
        RunDirError: It is a run with code of others that is not trusted.
    """
    if model is None:
        return None
    name = run_classifier.resolve_model(model, root)
    if run_classifier.is_run_of_classifier(name):
        trust.require_trust_of(name, is_trusted)
    return name


def load_robustness(
    runs: Sequence[str], values: Mapping[str, Any], overrides: Sequence[str], root: Path, is_trusted: bool
) -> loading.Loaded:
    """Return the configuration that measures the robustness of training runs below `root`.

    `values` are those of its keys, None for the default; corruptions may be `all`.

    Raises:
        ConfigError: With all problems.
        RunDirError: A run has code of others that is not trusted.
    """
    from cvlab.experiments.adversarial.robustness import load_robustness

    if not runs and not any(text.startswith("models=") for text in overrides):
        raise ConfigError("no run is named", "`cvlab attack RUN --on test` attacks a training run on its test images")
    paths = [resolve_model(name, root, is_trusted) for name in runs]
    if values.get("corruptions") == ["all"]:
        values = {**values, "corruptions": list(CORRUPTIONS)}
    return load_robustness([path for path in paths if path is not None], overrides, **values)


def look_values(names: Sequence[str], root: Path, is_trusted: bool) -> Values:
    """Return the keys of a network and of photos, given as names of which the first is the network's.

    Raises:
        ConfigError: No network is named, or it is unknown.
        DataError: None of the photos exists.
        RunDirError: It is a run with code of others that is not trusted.
    """
    if not names:
        raise ConfigError("no network is named", "`cvlab look latest`, or `cvlab look efficientnet_lite0 photo.jpg`")
    if names[0] == photo_paths.SAMPLE or names[0].lower().endswith(photo_paths.SUFFIXES):
        raise ConfigError(f"{names[0]} is a photo; the network comes first", f"`cvlab look latest {names[0]}`")
    photo_paths.require_any(names[1:])
    return {"model": resolve_model(names[0], root, is_trusted), "images": list(names[1:])}


def load_attack(values: Mapping[str, Any], overrides: Sequence[str]) -> loading.Loaded:
    """Return the configuration of an attack on photos, which depends on the method; `values` are those of its keys.

    Raises:
        ConfigError: With all problems.
    """
    method = values.get("method")
    if method not in PHOTO_SET_METHODS:
        return load("attack", values, overrides)
    unused = next((key for key in ("size", "survive", "then") if values.get(key) is not None), None)
    if unused is not None:
        raise ConfigError(f"{unused} has no effect with method {method}", "it is for attacks on single photos")
    name = PHOTO_SET_METHODS[method]
    texts = to_texts({key: value for key, value in values.items() if value is not None and key != "method"})
    document = Document({"experiment": name}, {}, "command line")
    return loading.load_document(document, Path(f"{name}.yaml"), [*texts, *overrides])


def style_config(preset: str | None) -> str:
    """Return the name of the shipped configuration of a preset of `style`. ConfigError if there is no such preset."""
    presets = {name.removeprefix(f"{STYLE}_"): name for name in loading.shipped_names() if name.startswith(f"{STYLE}_")}
    presets = {"painting": STYLE, **presets}
    if preset is not None and preset not in presets:
        raise registry.unknown_name_error("preset", preset, presets)
    return presets[preset or "painting"]


def fast_style_values(values: Values, unused: Values) -> Values:
    """Return the keys of a fast style transfer among those of `style`; `unused` are further options.

    Raises:
        ConfigError: An option is given that has no effect.
    """
    fast_keys = ("content", "styles", "strength", "size", "mix", "keep_colors")
    unused = unused | {key: value for key, value in values.items() if key not in fast_keys}
    name = next((key for key, value in unused.items() if value is not None), None)
    if name is not None:
        option = {"masks": "mask", "style_masks": "style_mask"}.get(name, name).replace("_", "-")
        raise ConfigError(f"--{option} has no effect with --fast", "leave one of them out")
    return {key: values.get(key) for key in fast_keys}


def saliency_of(
    values: Values, model: str | None, weights: Any, box: int | None, word: str | None
) -> tuple[str, Values]:
    """Return the configuration that explains a detection or a word of a caption, and its keys.

    Args:
        values: Keys of `saliency`.
        model: A detector, or a run of a detector or a captioner; None for the bundled one.
        weights: A file with its weights.
        box: Number of the detection, from 1.
        word: The word; None for a detection.

    Raises:
        ConfigError: An option is given that has no effect.
    """
    option = "--box" if word is None else "--word"
    if box is not None and word is not None:
        raise ConfigError("--box and --word are both given", "leave one of them out")
    if values.get("method") == "occlusion":
        values = {**values, "method": None}
    name = next((key for key, value in values.items() if key != "images" and value is not None), None)
    if name is not None:
        shown = {"target": "class"}.get(name, name)
        hint = "the score of a box, or of a word, is explained by occlusion; leave it out"
        raise ConfigError(f"--{shown} has no effect with {option}", hint)
    if model in BUNDLED_DETECTOR_NAMES and word is None:
        names = {"model": "yolo" if model == "everyday" else model, "weights": weights}
    elif model is not None and weights is not None:
        raise ConfigError("--weights and a run are both given", "a run has its own weights")
    else:
        names = {"weights": weights if model is None else model}
    explained = {"explain_box": 1 if box is None else box} if word is None else {"explain_word": word}
    return "detect" if word is None else "caption", {"images": values.get("images"), **names, **explained}


def attack_failure(result: Mapping[str, Any]) -> str:
    """Return the message of an attack without success; "" if it has changed and survived on a photo, or had none to."""
    metrics = result["metrics"]
    if not metrics.get("num_attacked") or metrics.get("survival_rate", metrics["success_rate"]) > 0:
        return ""
    if metrics["success_rate"] > 0:
        return "the attack survives the changes on none of the photos; try more steps, or a larger lr or --eps"
    attacked = [row for row in result["results"] if "error" not in row and not row["is_target_before"]]
    photos = "the photo" if len(attacked) == 1 else f"any of the {len(attacked)} photos"
    best = max((row["target_after"] for row in attacked if "target_after" in row), default=None)
    target = f" to {attacked[0]['target']!r} (highest probability {best:.2f})" if best is not None else ""
    return f"the attack did not change the prediction for {photos}{target}; try more steps, or a larger lr or --eps"
