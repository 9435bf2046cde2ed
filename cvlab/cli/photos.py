"""The commands on photos; each runs its shipped configuration with the keys that the command line changes."""

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cvlab.cli.groups import PHOTOS
from cvlab.cli.options import (
    DryRun,
    ModelOptions,
    Output,
    RunOptions,
    Seed,
    Trust,
    complete_run,
    expand_options,
    finish,
    show_plan,
)
from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from cvlab.config.loading import Loaded

app = typer.Typer()

Images = Annotated[
    list[str] | None,
    typer.Argument(help="photos, folders, patterns, or `sample` for a bundled photo; key=value for other settings"),
]
Values = dict[str, Any]  # of configuration keys; None: not given
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


def split_arguments(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Split arguments into names of photos and overrides `key=value`."""
    overrides = [text for text in arguments or [] if OVERRIDE.match(text) and not os.path.lexists(text)]
    return [text for text in arguments or [] if text not in overrides], overrides


def start(
    name: str,
    values: Values,
    overrides: Sequence[str],
    options: RunOptions,
    dry_run: bool,
    output: Output,
) -> None:
    """Run a shipped configuration with `values` of its keys and overrides `key=value`, or print its plan."""
    from cvlab.api import photos

    loaded = photos.load(name, values | {"device": options.device}, [*overrides, *(options.set_ or [])])
    _run_or_plan(loaded, options, dry_run, output)


def _run_or_plan(
    loaded: "Loaded",
    options: RunOptions,
    dry_run: bool,
    output: Output,
    get_failure: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Run a configuration, or print its plan.

    `get_failure` returns why a result is no success, "" if it is one; the exit code is 3 then.
    """
    from cvlab.api import photos
    from cvlab.runs.find import runs_root

    root = runs_root(options.runs_dir)
    if dry_run:
        show_plan(loaded, root, output)
    else:
        result = photos.start(loaded, root)
        finish(result, output, get_failure(result) if get_failure is not None else "")


def require_photos(images: list[str], overrides: list[str], options: RunOptions) -> None:
    """Raise ConfigError unless a photo is named, DataError if none of those that are named exists."""
    from cvlab.api import photos

    photos.require_photos(images, [*overrides, *(options.set_ or [])])


@app.command(rich_help_panel=PHOTOS)
@expand_options
def classify(
    images: Images = None,
    top: Annotated[int | None, typer.Option(help="number of classes to list")] = None,
    dry_run: DryRun = False,
    *,
    model: ModelOptions,
    options: RunOptions,
    output: Output,
) -> None:
    """Classify images. Example: `cvlab classify photos/*.jpg`."""
    names, overrides = split_arguments(images)
    require_photos(names, overrides, options)
    values = {"images": names or None, "top": top, **model.values(options)}
    start("classify_photos", values, overrides, options, dry_run, output)


@app.command(rich_help_panel=PHOTOS)
@expand_options
def saliency(
    images: Images = None,
    class_: Annotated[str | None, typer.Option("--class", help="class to explain; default: the predicted one")] = None,
    objective: Annotated[str | None, typer.Option(help="explain the score of the class or its loss")] = None,
    method: Annotated[str | None, typer.Option(help="gradient, gradcam, occlusion, ...: what computes the map")] = None,
    compare: Annotated[
        bool | None, typer.Option("--compare", help="also draw and score the maps of all methods on one sheet")
    ] = None,
    box: Annotated[
        int | None,
        typer.Option(help="explain this detection of a detector: --model yolo, everyday, faster_rcnn or RUN"),
    ] = None,
    word: Annotated[
        str | None, typer.Option(help="explain this word of a captioner's sentence: --model RUN, or the bundled one")
    ] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    *,
    model: ModelOptions,
    options: RunOptions,
    output: Output,
) -> None:
    """Show which pixels a prediction depends on. Example: `cvlab saliency photo.jpg`."""
    from cvlab.api import photos

    names, overrides = split_arguments(images)
    require_photos(names, overrides, options)
    values: Values = {
        "images": names or None,
        "target": class_,
        "objective": objective,
        "method": method,
        "compare": compare,
        "seed": seed,
    }
    name = "saliency"
    if box is not None or word is not None or model.model in photos.BUNDLED_DETECTOR_NAMES:
        name, values = photos.saliency_of(values, model.model, model.weights, box, word)
    else:
        values |= model.values(options)
    start(name, values, overrides, options, dry_run, output)


@app.command(rich_help_panel=PHOTOS)
@expand_options
def attack(
    images: Images = None,
    target: Annotated[str | None, typer.Option(help="target class; default: any class but the predicted one")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="l2, fgsm, pgd, deepfool or cw; universal or patch: one for all photos; "
            "with --on: fgsm, pgd, apgd_ce, apgd_dlr, square"
        ),
    ] = None,
    eps: Annotated[
        str | None, typer.Option(help="largest change of a pixel, in 1/255; with --on: also several, comma-separated")
    ] = None,
    size: Annotated[str | None, typer.Option(help="original, or model: first reduce to the model's input size")] = None,
    survive: Annotated[
        str | None,
        typer.Option(help="changes that the attack must survive: jpeg75, resize, crop"),
    ] = None,
    then: Annotated[str | None, typer.Option(help="saliency: also explain the attacked photos")] = None,
    on: Annotated[
        str | None,
        typer.Option(help="train, val or test: attack training runs, named instead of photos, on these images"),
    ] = None,
    corrupt: Annotated[str | None, typer.Option(help="with --on: all, or some of noise,blur,contrast,jpeg")] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    *,
    model: ModelOptions,
    options: RunOptions,
    output: Output,
) -> None:
    """Change an image slightly so that it is misclassified. Example: `cvlab attack --target ostrich img.jpg`."""
    from cvlab.api import photos

    names, overrides = split_arguments(images)
    if on is not None:
        photo_values = {"target": target, "size": size, "survive": survive, "then": then}
        photo_values |= {"model": model.model, "weights": model.weights}
        unused = next((f"--{key}" for key, value in photo_values.items() if value is not None), None)
        if unused is not None:
            raise ConfigError(f"{unused} has no effect with --on", "name training runs instead of photos")
        values: Values = {"on": on, "methods": _names(method, "--method"), "eps": _numbers(eps, "--eps"), "seed": seed}
        values |= {"corruptions": _names(corrupt, "--corrupt"), "device": options.device}
        _measure_robustness(names, values, overrides, model.trust, options, dry_run, output)
        return
    if corrupt is not None:
        raise ConfigError("--corrupt needs --on", "`cvlab attack RUN --on test --corrupt all`")
    require_photos(names, overrides, options)
    bounds = _numbers(eps, "--eps")
    if bounds is not None and len(bounds) > 1:
        raise ConfigError("--eps: one number for photos", "several need --on test and a training run")
    values = {"images": names or None, "target": target, "method": method, "eps": bounds[0] if bounds else None}
    values |= {"size": size, "survive": _names(survive, "--survive"), "then": then, "seed": seed}
    values |= {"device": options.device, **model.values(options)}
    loaded = photos.load_attack(values, [*overrides, *(options.set_ or [])])
    _run_or_plan(loaded, options, dry_run, output, photos.attack_failure)


def _measure_robustness(
    runs: list[str],
    values: Values,
    overrides: Sequence[str],
    is_trusted: bool,
    options: RunOptions,
    dry_run: bool,
    output: Output,
) -> None:
    """Measure the robustness of training runs, or print the plan."""
    from cvlab.api import photos
    from cvlab.runs.find import runs_root

    root = runs_root(options.runs_dir)
    loaded = photos.load_robustness(runs, values, [*overrides, *(options.set_ or [])], root, is_trusted)
    _run_or_plan(loaded, options, dry_run, output)


@app.command(rich_help_panel=PHOTOS)
@expand_options
def classvis(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="key=value; with --init image the photo to start from")
    ] = None,
    target: Annotated[str | None, typer.Option(help="classes to visualize, separated by commas")] = None,
    channel: Annotated[
        str | None, typer.Option(help="instead, channels of a layer: blocks.4:17, or a grid, blocks.4:0-15")
    ] = None,
    diversity: Annotated[int | None, typer.Option(help="number of images of each target, made to differ")] = None,
    init: Annotated[str | None, typer.Option(help="noise or image")] = None,
    steps: Annotated[int | None, typer.Option(help="optimization steps")] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    *,
    model: ModelOptions,
    options: RunOptions,
    output: Output,
) -> None:
    """Generate an image that maximizes the score of a class. Example: `cvlab classvis --target gorilla`."""
    from cvlab.data import photo_paths

    names, overrides = split_arguments(arguments)
    photo_paths.require_any(names)
    if channel is not None and target is not None:
        raise ConfigError("--channel and --target are both given", "leave one of them out")
    values = {
        "images": names or None,
        "targets": [] if channel is not None else _names(target, "--target"),
        "channel": channel,
        "diversity": diversity,
        "init": init,
        "steps": steps,
        "seed": seed,
    }
    start("class_visualization", values | model.values(options), overrides, options, dry_run, output)


@app.command(rich_help_panel=PHOTOS)
@expand_options
def dream(
    images: Images = None,
    layer: Annotated[
        str | None, typer.Option(help="layer to amplify, such as blocks.3, or one of its channels, blocks.3:17")
    ] = None,
    octaves: Annotated[int | None, typer.Option(help="number of image sizes, from coarse to fine")] = None,
    steps: Annotated[int | None, typer.Option(help="steps in each octave")] = None,
    size: Annotated[int | None, typer.Option(help="longer side of the result in pixels, at most")] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    *,
    model: ModelOptions,
    options: RunOptions,
    output: Output,
) -> None:
    """Amplify what a layer sees in images (DeepDream). Example: `cvlab dream photo.jpg --layer blocks.3`."""
    names, overrides = split_arguments(images)
    require_photos(names, overrides, options)
    values = {"images": names or None, "layer": layer, "octaves": octaves, "steps": steps, "size": size, "seed": seed}
    start("dream", values | model.values(options), overrides, options, dry_run, output)


@app.command(rich_help_panel=PHOTOS)
@expand_options
def look(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="a training run of a classifier (`latest`: the newest) or a pretrained model, then photos; key=value",
            autocompletion=complete_run,
        ),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="layers whose feature maps are drawn, separated by commas")] = None,
    on: Annotated[
        str | None, typer.Option(help="train, val or test of a run, or a folder of photos: also neighbors and t-SNE")
    ] = None,
    landscape: Annotated[
        bool | None, typer.Option("--landscape", help="also draw the loss of a run around its weights")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="file with the model's weights")] = None,
    trust: Trust = False,
    seed: Seed = None,
    dry_run: DryRun = False,
    *,
    options: RunOptions,
    output: Output,
) -> None:
    """Show what is inside a network, layer by layer. Example: `cvlab look latest`."""
    from cvlab.api import photos
    from cvlab.runs.find import runs_root

    names, overrides = split_arguments(arguments)
    values = photos.look_values(names, runs_root(options.runs_dir), trust)
    values |= {"layers": _names(layer, "--layer"), "on": on, "landscape": landscape, "weights": weights, "seed": seed}
    start("look", values, overrides, options, dry_run, output)


@app.command(rich_help_panel=PHOTOS)
@expand_options
def style(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="a photo, then one or more style images (`whirls` is a bundled one); key=value"),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="factor of the style loss; with --fast from 0 to 1; default: 1")
    ] = None,
    size: Annotated[int | None, typer.Option(help="longer side of the result in pixels")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="one pass of a feed-forward network instead (extra `style`)")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="painting, or NAME of a shipped configuration style_NAME: sketch, texture, ...")
    ] = None,
    keep_colors: Annotated[bool, typer.Option("--keep-colors", help="keep the colors of the photo")] = False,
    init: Annotated[str | None, typer.Option(help="content, noise, or fast: the result of --fast")] = None,
    mix: Annotated[str | None, typer.Option(help="weights of the styles, separated by commas")] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help="image that is white where a style applies; one per style")
    ] = None,
    style_mask: Annotated[
        list[str] | None, typer.Option(help="image that is white where the style is taken from; one per mask")
    ] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    *,
    model: ModelOptions,
    options: RunOptions,
    output: Output,
) -> None:
    """Transfer the style of one image to another. Example: `cvlab style photo.jpg painting.jpg`."""
    from cvlab.api import photos

    names, overrides = split_arguments(arguments)
    photos.require_style_images(names, [*(mask or []), *(style_mask or [])])
    values: Values = {"content": names[0], "styles": names[1:], "strength": strength, "size": size, "init": init}
    values |= {"keep_colors": keep_colors or None, "mix": _numbers(mix, "--mix"), "masks": mask}
    values |= {"style_masks": style_mask, "seed": seed}
    if fast:
        unused = {"preset": preset, "model": model.model, "weights": model.weights}
        values = photos.fast_style_values(values, unused)
    else:
        values |= model.values(options)
    start(photos.FAST_STYLE if fast else photos.style_config(preset), values, overrides, options, dry_run, output)


def _numbers(text: str | None, flag: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: not numbers separated by commas", f"{flag} 0.7,0.3") from error


def _names(text: str | None, flag: str) -> list[str] | None:
    """Return the names in an option's value; ConfigError if one of them is empty."""
    names = [part.strip() for part in text.split(",")] if text is not None else None
    if names is not None and not all(names):
        raise ConfigError(f"{flag} {text}: an empty name", f"{flag} person,dog")
    return names


@app.command(rich_help_panel=PHOTOS)
@expand_options
def caption(
    images: Images = None,
    weights: Annotated[str | None, typer.Option(help="run of a captioner, or a file with weights")] = None,
    beam: Annotated[int | None, typer.Option(help="beam width; 1 is greedy decoding")] = None,
    guide: Annotated[
        bool | None,
        typer.Option(
            "--guide/--no-guide", help="name what a detector and a classifier see; default: with the bundled weights"
        ),
    ] = None,
    attention: Annotated[bool, typer.Option("--attention", help="also draw the attention of each word")] = False,
    dry_run: DryRun = False,
    *,
    options: RunOptions,
    output: Output,
) -> None:
    """Describe images in a sentence. Example: `cvlab caption photo.jpg`."""
    names, overrides = split_arguments(images)
    require_photos(names, overrides, options)
    values = {"images": names or None, "weights": weights, "beam": beam, "guide": guide}
    values["attention"] = attention or None
    start("caption", values, overrides, options, dry_run, output)


@app.command(rich_help_panel=PHOTOS)
@expand_options
def detect(
    images: Images = None,
    model: Annotated[str | None, typer.Option(help="yolo, faster_rcnn or yolov3_tiny; default: yolo")] = None,
    weights: Annotated[str | None, typer.Option(help="run of a detector, or a file with weights")] = None,
    source: Annotated[
        str | None, typer.Option(help="a video file, or the number of a camera, in place of images")
    ] = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="classes to detect, separated by commas; default: all")
    ] = None,
    tile: Annotated[
        str | None, typer.Option(help="also detect on tiles of this side in pixels, or `auto`; for large photos")
    ] = None,
    conf: Annotated[float | None, typer.Option(help="score threshold; default: one that suits the weights")] = None,
    iou: Annotated[float | None, typer.Option(help="IoU threshold of non-maximum suppression")] = None,
    explain: Annotated[
        str | None, typer.Option(help="also draw the grid, anchors or targets of YOLO, or the proposals of stage one")
    ] = None,
    save_json: Annotated[bool, typer.Option("--save-json", help="also write all boxes as COCO results")] = False,
    save_coco: Annotated[bool, typer.Option("--save-coco", help="also write all boxes as a COCO data set")] = False,
    save_csv: Annotated[bool, typer.Option("--save-csv", help="also write all boxes as a table")] = False,
    save_txt: Annotated[bool, typer.Option("--save-txt", help="also write each photo's boxes as YOLO txt")] = False,
    save_xml: Annotated[bool, typer.Option("--save-xml", help="also write each photo's boxes as VOC XML")] = False,
    save_crop: Annotated[bool, typer.Option("--save-crop", help="also write each detection as an image")] = False,
    every: Annotated[int | None, typer.Option(help="with --source: detect in every N-th frame")] = None,
    max_frames: Annotated[int | None, typer.Option(help="with --source: stop after N of these frames")] = None,
    track: Annotated[
        bool | None, typer.Option("--track/--no-track", help="with --source: one id for an object in all frames")
    ] = None,
    dry_run: DryRun = False,
    *,
    options: RunOptions,
    output: Output,
) -> None:
    """Detect objects in images or a video. Without either, evaluate the detector on its validation split."""
    from cvlab.data import photo_paths

    names, overrides = split_arguments(images)
    photo_paths.require_any(names)
    kinds = {"json": save_json, "coco": save_coco, "csv": save_csv, "txt": save_txt, "xml": save_xml, "crop": save_crop}
    values = {
        "images": names,
        "model": model,
        "weights": weights,
        "source": source,
        "classes": _names(class_, "--class"),
        "tile": int(tile) if tile and tile.isdecimal() else tile,
        "conf": conf,
        "iou": iou,
        "explain": explain,
        "save": [kind for kind, is_given in kinds.items() if is_given] or None,
        "every": every,
        "max_frames": max_frames,
        "track": track,
    }
    start("detect", values, overrides, options, dry_run, output)
