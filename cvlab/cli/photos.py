"""The commands on photos: classify, saliency, attack, classvis, style, caption; each builds a configuration."""

import glob
import json
import os
import re
from typing import Annotated, Any

import typer

from cvlab import console, registry
from cvlab.cli.options import Debug, Device, DryRun, Json, Quiet, RunsDir, Seed, SetOption, Verbose, finish, show_plan
from cvlab.errors import ConfigError, DataError

app = typer.Typer()

Images = Annotated[
    list[str] | None,
    typer.Argument(help="photos, folders, patterns; `sample` for one that comes along; key=value for the rest"),
]
Model = Annotated[str | None, typer.Option(help="efficientnet_lite0 (comes along), timm:NAME or torchvision:NAME")]
Weights = Annotated[str | None, typer.Option(help="a file with the model's weights")]


Flags = dict[str, Any]
PRESETS = ("painting", "sketch", "texture", "composition_vii", "scream", "starry_night")  # configs/style_*.yaml
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


def _run(name: str, words: list[str] | None, flags: Flags, runs_dir: str | None, dry_run: bool, as_json: bool) -> None:
    """Run a shipped configuration with what the command line changes: photos, `key=value`, flags."""
    images, overrides = split_words(words)
    _require_photos(images, [*overrides, *(flags["set_"] or [])], name, flags)
    start(name, overrides, flags | {"images": images or None}, runs_dir, dry_run, as_json)


def split_words(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Tell photos from `key=value`."""
    overrides = [word for word in words or [] if OVERRIDE.match(word) and not os.path.lexists(word)]
    return [word for word in words or [] if word not in overrides], overrides


def start(name: str, overrides: list[str], flags: Flags, runs_dir: str | None, dry_run: bool, as_json: bool) -> None:
    """Run a shipped configuration with flags that are given, as keys of the same name, and `key=value`."""
    from cvlab.api import run
    from cvlab.config import loading
    from cvlab.data.resolve import DownloadPolicy
    from cvlab.runs.find import runs_root

    set_ = flags.pop("set_") or []
    # JSON is YAML, and quotes whatever a name may hold.
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    loaded = loading.load(str(loading.shipped_folder() / f"{name}.yaml"), [*given, *overrides, *set_])
    root = runs_root(runs_dir)
    if dry_run:
        show_plan(loaded, root, as_json)
        return
    finish(run.start(loaded, DownloadPolicy(True, False, False), root), as_json)


def _require_photos(images: list[str], overrides: list[str], name: str, flags: Flags) -> None:
    """Refuse a command without photos, or with none that is there, before anything heavy is loaded."""
    needs = name != "class_visualization" or flags.get("init") == "image" or "init=image" in overrides
    if needs and not images and not any(word.startswith("images=") for word in overrides):
        raise ConfigError("no photo is named", "give files, folders or patterns; `sample` is one that comes along")
    require_there(images)


def require_there(images: list[str]) -> None:
    """Refuse photos none of which is there, before anything heavy is loaded."""
    if images and all(_is_missing(image) for image in images):
        raise DataError(f"{images[0]}: no such file", "no photo at hand? `sample` names one that comes along")


def _is_missing(image: str) -> bool:
    is_file = image not in ("sample", "whirls") and "://" not in image and not glob.has_magic(image)
    return is_file and not os.path.lexists(image)


@app.command()
def classify(
    images: Images = None,
    model: Model = None,
    weights: Weights = None,
    top: Annotated[int | None, typer.Option(help="classes to name")] = None,
    set_: SetOption = None,
    device: Device = None,
    runs_dir: RunsDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say what photos show. `cvlab classify photos/*.jpg`."""
    console.set_level(quiet, verbose)
    flags: Flags = {"model": model, "weights": weights, "top": top, "set_": set_, "device": device}
    _run("classify_photos", images, flags, runs_dir, dry_run, as_json)


@app.command()
def saliency(
    images: Images = None,
    class_: Annotated[str | None, typer.Option("--class", help="explain this class; else what the net sees")] = None,
    of: Annotated[str | None, typer.Option(help="score or loss")] = None,
    method: Annotated[str | None, typer.Option(help="gradient, smoothgrad, integrated_gradients or gradcam")] = None,
    model: Model = None,
    weights: Weights = None,
    set_: SetOption = None,
    device: Device = None,
    seed: Seed = None,
    runs_dir: RunsDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show which pixels a net's answer depends on."""
    console.set_level(quiet, verbose)
    flags: Flags = {"target": class_, "of": of, "method": method, "model": model, "weights": weights}
    flags |= {"set_": set_, "device": device, "seed": seed}
    _run("saliency", images, flags, runs_dir, dry_run, as_json)


@app.command()
def attack(
    images: Images = None,
    target: Annotated[str | None, typer.Option(help="what the net is to see; without it, anything else")] = None,
    method: Annotated[str | None, typer.Option(help="l2, fgsm or pgd")] = None,
    eps: Annotated[float | None, typer.Option(help="fgsm, pgd: largest change of a pixel, in 1/255")] = None,
    size: Annotated[str | None, typer.Option(help="original, or model: the picture that the net sees")] = None,
    then: Annotated[str | None, typer.Option(help="saliency: explain the attacked pictures too")] = None,
    model: Model = None,
    weights: Weights = None,
    set_: SetOption = None,
    device: Device = None,
    seed: Seed = None,
    runs_dir: RunsDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Change photos until a net is fooled. `cvlab attack --target ostrich img.jpg`."""
    console.set_level(quiet, verbose)
    if (
        eps is not None
        and method in (None, "l2")
        and not any("method=" in word for word in [*(images or []), *(set_ or [])])
    ):
        raise ConfigError("--eps: the method l2 has no such bound", "give --method fgsm or pgd")
    if target is None and not any(word.startswith("target=") for word in [*(images or []), *(set_ or [])]):
        set_ = ["target=null", *(set_ or [])]  # the shipped configuration has one
    flags: Flags = {"target": target, "method": method, "eps": eps, "size": size, "then": then, "model": model}
    flags |= {"weights": weights, "set_": set_, "device": device, "seed": seed}
    _run("attack", images, flags, runs_dir, dry_run, as_json)


@app.command()
def classvis(
    words: Annotated[
        list[str] | None, typer.Argument(help="key=value; a photo to start from with --init image")
    ] = None,
    target: Annotated[str | None, typer.Option(help="the class to draw; may be several, with commas")] = None,
    init: Annotated[str | None, typer.Option(help="noise or image")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of each picture")] = None,
    model: Model = None,
    weights: Weights = None,
    set_: SetOption = None,
    device: Device = None,
    seed: Seed = None,
    runs_dir: RunsDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Draw what a net has learned of a class. `cvlab classvis --target gorilla`."""
    console.set_level(quiet, verbose)
    targets = [part.strip() for part in target.split(",")] if target else None
    flags: Flags = {"targets": targets, "init": init, "steps": steps, "model": model, "weights": weights}
    flags |= {"set_": set_, "device": device, "seed": seed}
    _run("class_visualization", words, flags, runs_dir, dry_run, as_json)


@app.command()
def style(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="a photo, then one or more pictures to take the style of (`whirls` comes along); key=value"
        ),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="of the style; 1 is usual")] = None,
    size: Annotated[int | None, typer.Option(help="longer side of the picture in pixels")] = None,
    preset: Annotated[str | None, typer.Option(help=f"{', '.join(PRESETS)}")] = None,
    keep_colors: Annotated[bool, typer.Option("--keep-colors", help="keep the photo's colours")] = False,
    init: Annotated[str | None, typer.Option(help="content or noise")] = None,
    mix: Annotated[str | None, typer.Option(help="a weight for each style, with commas")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="where a style goes, white on black; one for each")] = None,
    style_mask: Annotated[
        list[str] | None, typer.Option(help="where in a style it is taken from; one per mask")
    ] = None,
    model: Model = None,
    weights: Weights = None,
    set_: SetOption = None,
    device: Device = None,
    seed: Seed = None,
    runs_dir: RunsDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Paint a photo in the manner of a picture. `cvlab style photo.jpg painting.jpg`."""
    console.set_level(quiet, verbose)
    images, overrides = split_words(words)
    if len(images) < 2:
        missing = "photo is named" if not images else "style is named"
        raise ConfigError(f"no {missing}", "`cvlab style photo.jpg painting.jpg`; `sample` and `whirls` come along")
    for name in [*images, *(mask or []), *(style_mask or [])]:
        if _is_missing(name):
            raise DataError(f"{name}: no such file", "`sample` is a photo that comes along, `whirls` a painting")
    if preset is not None and preset not in PRESETS:
        raise registry.unknown_name_error("preset", preset, PRESETS)
    flags: Flags = {"content": images[0], "styles": images[1:], "strength": strength, "size": size, "init": init}
    flags |= {
        "keep_colors": keep_colors or None,
        "mix": _numbers(mix, "--mix"),
        "masks": mask,
        "style_masks": style_mask,
    }
    flags |= {"model": model, "weights": weights, "set_": set_, "device": device, "seed": seed}
    is_usual = preset in (None, "painting")
    start("style" if is_usual else f"style_{preset}", overrides, flags, runs_dir, dry_run, as_json)


@app.command()
def caption(
    images: Images = None,
    weights: Annotated[str | None, typer.Option(help="a run that trained a captioner, or a weights file")] = None,
    beam: Annotated[int | None, typer.Option(help="sentences that are followed at once; 1 is greedy")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="draw where it looks for each word")] = False,
    set_: SetOption = None,
    device: Device = None,
    runs_dir: RunsDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say in a sentence what photos show. `cvlab caption photo.jpg`."""
    console.set_level(quiet, verbose)
    flags: Flags = {"weights": weights, "beam": beam, "attention": attention or None, "set_": set_, "device": device}
    _run("caption", images, flags, runs_dir, dry_run, as_json)


def _numbers(text: str | None, flag: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: not numbers with commas between them", f"{flag} 0.7,0.3") from error
