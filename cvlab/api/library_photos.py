"""cvlab from Python: the commands on photos, as functions that return runs; see `library`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cvlab.api import photos as api_photos
from cvlab.api.handles import Run
from cvlab.api.library import Overrides, StrPath, root_of
from cvlab.config.overrides import to_texts
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs.find import find_run

if TYPE_CHECKING:
    from cvlab.config.loading import Loaded
    from cvlab.experiments.interpretability.config import SaliencyMethod

Photos = StrPath | Sequence[StrPath]


def classify(
    photos: Photos,
    *,
    top: int | None = None,
    model: StrPath | None = None,
    weights: StrPath | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Classify photos: `classify("cat.jpg").results[0]["label"]`.

    Args:
        photos: Files, folders or patterns; `sample` is a bundled photo. A photo that cannot be read is a result with
            an `error`, and a warning.
        top: Number of classes to list.
        model: A pretrained model, or a run of a classifier.
        weights: File with the model's weights.
        overrides: Other keys of the experiment.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        runs_dir: Folder of the runs; None for $CVLAB_RUNS or ./runs.
        trust: Run the Python files of a run that was not made on this machine.
        progress: Show messages and a progress bar.

    Raises:
        DataError: No photo can be read.
        CvlabError: As `train`.
    """
    values = {"images": _photos(photos, overrides), "top": top, **_model(model, weights, runs_dir, trust)}
    return _run_photos("classify_photos", values, overrides, device, runs_dir, progress)


def saliency(
    photos: Photos,
    *,
    target: str | int | None = None,
    objective: Literal["score", "loss"] | None = None,
    method: SaliencyMethod | None = None,
    compare: bool | None = None,
    box: int | None = None,
    word: str | None = None,
    model: StrPath | None = None,
    weights: StrPath | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Show which pixels a prediction depends on.

    Args:
        photos: See `classify`.
        target: Class to explain, by name or index; None for the predicted one.
        objective: Explain the score of the class, or its loss.
        method: How.
        compare: Also draw and score the maps of all methods on one sheet.
        box: Instead of a class, explain the detection with this number, from 1; `model` is a detector.
        word: Instead of a class, explain this word of a captioner's sentence.
        model: See `classify`; with `box` or `word` a bundled detector, or a run.
        weights: See `classify`.
        seed: Seed of the noise of `smoothgrad`.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        trust: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    values = {"images": _photos(photos, overrides), "target": target, "objective": objective, "method": method}
    values |= {"compare": compare, "seed": seed}
    detector = fspath(model) if model is not None else None
    if box is None and word is None and detector not in api_photos.BUNDLED_DETECTOR_NAMES:
        values |= _model(model, weights, runs_dir, trust)
        return _run_photos("saliency", values, overrides, device, runs_dir, progress)
    if detector is not None and detector not in api_photos.BUNDLED_DETECTOR_NAMES:
        detector = _run_or_file(detector, runs_dir)
    name, keys = api_photos.saliency_of(values, detector, weights, box, word)
    return _run_photos(name, keys, overrides, device, runs_dir, progress)


def attack(
    photos: Photos,
    *,
    target: str | int | None = None,
    method: Literal["l2", "fgsm", "pgd", "deepfool", "cw", "universal", "patch"] | None = None,
    eps: float | None = None,
    size: Literal["original", "model"] | None = None,
    survive: Sequence[str] | None = None,
    then: Literal["saliency"] | None = None,
    model: StrPath | None = None,
    weights: StrPath | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Change the prediction for photos imperceptibly; `Run.raise_for_status` raises if it was changed for none.

    Args:
        photos: See `classify`.
        target: Class that is to be predicted, by name or index; None for any but the predicted one.
        method: How; `universal` finds one perturbation for all photos, and takes neither size, survive nor then.
        eps: Largest change of a pixel, in 1/255, for `fgsm`, `pgd` and `universal`.
        size: Attack the photo as it is, or first reduce it to the model's input size.
        survive: Changes after which the photo is to fool the model too: `jpeg75`, `resize`, `crop`, ...
        then: `saliency`: also explain the attacked photos.
        model: See `classify`.
        weights: See `classify`.
        seed: Seed of the random start of `pgd`, and of the changes and photos that are drawn.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        trust: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    values: dict[str, Any] = {"images": _photos(photos, overrides), "target": target, "method": method, "eps": eps}
    values |= {"size": size, "survive": survive, "then": then, "seed": seed, **_model(model, weights, runs_dir, trust)}
    return _run(api_photos.load_attack({**values, "device": device}, to_texts(overrides)), runs_dir, progress)


def classvis(
    targets: str | int | Sequence[str | int] = (),
    *,
    channel: str | None = None,
    diversity: int | None = None,
    init: Literal["noise", "image"] | None = None,
    photo: StrPath | None = None,
    steps: int | None = None,
    model: StrPath | None = None,
    weights: StrPath | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Generate images that maximize the score of a class, or the activation of a channel.

    Args:
        targets: Classes, by name or index; one image for each.
        channel: Instead of classes, channels of a layer: `blocks.4:17`, `blocks.4:0-15`.
        diversity: Number of images of each target, which are made to differ.
        init: Start from noise, or from `photo`.
        photo: With `init="image"`, the photo to start from.
        steps: Optimization steps.
        model: See `classify`.
        weights: See `classify`.
        seed: Seed of the noise and the random transforms.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        trust: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    classes = [targets] if isinstance(targets, (str, int)) else list(targets)
    images = _photos(photo, overrides) if photo is not None else None
    values: dict[str, Any] = {"targets": [str(name) for name in classes], "images": images, "init": init}
    values |= {"steps": steps, "channel": channel, "diversity": diversity, "seed": seed}
    values |= _model(model, weights, runs_dir, trust)
    return _run_photos("class_visualization", values, overrides, device, runs_dir, progress)


def dream(
    photos: Photos,
    *,
    layer: str | None = None,
    octaves: int | None = None,
    steps: int | None = None,
    size: int | None = None,
    model: StrPath | None = None,
    weights: StrPath | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Amplify what a layer sees in photos (DeepDream): `dream("cat.jpg").results[0].open("dream")`.

    Args:
        photos: See `classify`.
        layer: The layer, such as `blocks.3`, or one of its channels, `blocks.3:17`.
        octaves: Number of image sizes, from coarse to fine.
        steps: Steps in each octave.
        size: Longer side of the result in pixels, at most.
        model: See `classify`; it need not have a classifier.
        weights: See `classify`.
        seed: Seed of the random offsets.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        trust: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    values = {"images": _photos(photos, overrides), "layer": layer, "octaves": octaves, "steps": steps, "size": size}
    values |= {"seed": seed, **_model(model, weights, runs_dir, trust)}
    return _run_photos("dream", values, overrides, device, runs_dir, progress)


def look(
    model: StrPath,
    photos: Photos = (),
    *,
    layers: Sequence[str] | None = None,
    on: StrPath | None = None,
    landscape: bool | None = None,
    weights: StrPath | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Show what is inside a network: `look(run.path, on="test").summary["tables"]`.

    Args:
        model: A training run of a classifier, or a pretrained model, as in `classify`.
        photos: See `classify`; may be empty.
        layers: Layers whose feature maps are drawn; None: the last one of each resolution.
        on: `train`, `val` or `test` of a run, or a folder of photos: images for statistics, neighbors and t-SNE.
        landscape: Also measure the loss of a run around its weights.
        weights: See `classify`.
        seed: Seed of the directions of the landscape.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        trust: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    values = api_photos.look_values([fspath(model), *_paths(photos)], root_of(runs_dir), trust)
    values |= {"layers": layers, "on": fspath(on) if on is not None else None, "landscape": landscape}
    return _run_photos("look", values | {"weights": weights, "seed": seed}, overrides, device, runs_dir, progress)


def style(
    photo: StrPath,
    styles: Photos,
    *,
    strength: float | None = None,
    size: int | None = None,
    fast: bool = False,
    preset: str | None = None,
    keep_colors: bool | None = None,
    init: Literal["content", "noise", "fast"] | None = None,
    mix: Sequence[float] | None = None,
    masks: Sequence[StrPath] | None = None,
    style_masks: Sequence[StrPath] | None = None,
    model: StrPath | None = None,
    weights: StrPath | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Run:
    """Transfer the style of one or more images to a photo.

    Args:
        photo: The photo; `sample` is a bundled one.
        styles: The style images; `whirls` is a bundled one.
        strength: Factor of the style loss; with `fast` from 0 to 1.
        size: Longer side of the result in pixels.
        fast: One pass of a feed-forward network instead of an optimization; an extra, `style`.
        preset: `painting`, or NAME of a shipped configuration `style_NAME`.
        keep_colors: Keep the colors of the photo.
        init: Start from the photo, from noise, or from the result of `fast`.
        mix: Weights of the styles.
        masks: Images that are white where a style applies; one per style.
        style_masks: Images that are white where the style is taken from; one per mask.
        model: See `classify`.
        weights: See `classify`.
        seed: Seed of the noise.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        trust: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    content, paintings = _paths(photo), _paths(styles)
    where, style_where = _paths(masks or ()), _paths(style_masks or ())
    api_photos.require_style_images([*content, *paintings], [*where, *style_where])
    values: dict[str, Any] = {"content": content[0], "styles": paintings, "strength": strength, "size": size}
    values |= {"init": init, "masks": where or None, "style_masks": style_where or None}
    values |= {"keep_colors": keep_colors, "mix": mix, "seed": seed}
    if fast:
        values = api_photos.fast_style_values(values, {"preset": preset, "model": model, "weights": weights})
    else:
        values |= _model(model, weights, runs_dir, trust)
    name = api_photos.FAST_STYLE if fast else api_photos.style_config(preset)
    return _run_photos(name, values, overrides, device, runs_dir, progress)


def detect(
    photos: Photos = (),
    *,
    model: Literal["auto", "yolo", "faster_rcnn", "yolov3_tiny"] | None = None,
    weights: StrPath | None = None,
    source: StrPath | int | None = None,
    classes: str | Sequence[str] | None = None,
    tile: int | Literal["auto"] | None = None,
    conf: float | None = None,
    iou: float | None = None,
    explain: Literal["grid", "anchors", "targets", "proposals"] | None = None,
    save: Sequence[Literal["json", "coco", "csv", "txt", "xml", "crop"]] | None = None,
    every: int | None = None,
    max_frames: int | None = None,
    track: bool | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    progress: bool = False,
) -> Run:
    """Detect objects in photos or a video: `detect("street.jpg").results[0]["objects"]`.

    Args:
        photos: See `classify`; without photos and video the detector is evaluated on its validation split.
        model: Which detector.
        weights: A run of a detector, or a file with weights.
        source: A video file, or the number of a camera, in place of photos.
        classes: Classes to detect; None for all.
        tile: Also detect on tiles of this side in pixels, or `auto`.
        conf: Score threshold; None for one that suits the weights.
        iou: IoU threshold of non-maximum suppression.
        explain: Also draw the grid, anchors or targets of YOLO, or the proposals of the first stage.
        save: Formats in which all boxes are also written; `crop`: each detection as an image.
        every: With `source`, detect in every N-th frame.
        max_frames: With `source`, stop after N of these frames.
        track: With `source`, one id for an object in all frames.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    from cvlab.data import photo_paths

    images = _paths(photos)
    photo_paths.require_any(images)
    values: dict[str, Any] = {
        "images": images,
        "model": model,
        "weights": _run_or_file(weights, runs_dir),
        "tile": tile,
        "conf": conf,
    }
    values |= {"source": source, "classes": [classes] if isinstance(classes, str) else classes, "iou": iou}
    values |= {"explain": explain, "save": save, "every": every, "max_frames": max_frames, "track": track}
    return _run_photos("detect", values, overrides, device, runs_dir, progress)


def caption(
    photos: Photos,
    *,
    weights: StrPath | None = None,
    beam: int | None = None,
    guide: bool | None = None,
    attention: bool | None = None,
    overrides: Overrides = None,
    device: str | None = None,
    runs_dir: StrPath | None = None,
    progress: bool = False,
) -> Run:
    """Describe photos in a sentence: `caption("dog.jpg").results[0]["sentence"]`.

    Args:
        photos: See `classify`.
        weights: A run of a captioner, or a file with weights.
        beam: Beam width; 1 is greedy decoding.
        guide: Name what the bundled detector and the backbone's classifier see; None: with the bundled weights.
        attention: Also draw the attention of each word.
        overrides: See `classify`.
        device: See `classify`.
        runs_dir: See `classify`.
        progress: See `classify`.

    Raises:
        CvlabError: As `classify`.
    """
    values = {"images": _photos(photos, overrides), "weights": _run_or_file(weights, runs_dir), "beam": beam}
    values |= {"guide": guide, "attention": attention}
    return _run_photos("caption", values, overrides, device, runs_dir, progress)


def _paths(photos: Photos) -> list[str]:
    """Return one path, or a sequence of them, as texts. ConfigError for anything else."""
    each = [photos] if isinstance(photos, (str, PathLike)) else photos
    is_sequence = isinstance(each, Sequence) and not isinstance(each, bytes)
    if not is_sequence or not all(isinstance(path, (str, PathLike)) for path in each):
        first = next((item for item in each if not isinstance(item, (str, PathLike))), each) if is_sequence else each
        raise ConfigError(
            f"{type(first).__name__} is no path of a photo", "save the image, or use `predict` of a run for images"
        )
    return [fspath(path) for path in each]


def _photos(photos: Photos, overrides: Overrides) -> list[str] | None:
    """Return the paths of photos, None if overrides have them. Raises an error if none is named, or none exists."""
    paths = _paths(photos)
    api_photos.require_photos(paths, to_texts(overrides))
    return paths or None


def _model(
    model: StrPath | None, weights: StrPath | None, runs_dir: StrPath | None, is_trusted: bool
) -> dict[str, Any]:
    """Return the keys of a pretrained model, or of a run of a classifier."""
    name = fspath(model) if model is not None else None
    return {"model": api_photos.resolve_model(name, root_of(runs_dir), is_trusted), "weights": weights}


def _run_or_file(weights: StrPath | None, runs_dir: StrPath | None) -> str | None:
    """Return weights that are given as a run of `runs_dir`, or as a file, in a way that a configuration takes."""
    if weights is None:
        return None
    name = fspath(weights)
    if runs_dir is None or Path(name).exists():
        return name
    try:
        return str(find_run(name, root_of(runs_dir)))
    except RunDirError:
        return name


def _run_photos(
    name: str,
    values: Mapping[str, Any],
    overrides: Overrides,
    device: str | None,
    runs_dir: StrPath | None,
    progress: bool,
) -> Run:
    """Run a shipped configuration on photos."""
    return _run(api_photos.load(name, {**values, "device": device}, to_texts(overrides)), runs_dir, progress)


def _run(loaded: Loaded, runs_dir: StrPath | None, progress: bool) -> Run:
    """Run a configuration."""
    from cvlab.api.session import library_call

    with library_call(progress):
        return Run(api_photos.start(loaded, root_of(runs_dir))["run"])
