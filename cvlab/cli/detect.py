"""The command `detect`: find things in photos, see how good a detector is, or what it sees."""

from typing import Annotated

import typer

from cvlab import console
from cvlab.cli.options import Debug, Device, DryRun, Json, Quiet, RunsDir, SetOption, Verbose
from cvlab.cli.photos import Flags, Images, require_there, split_words, start

app = typer.Typer()


@app.command()
def detect(
    images: Images = None,
    model: Annotated[
        str | None, typer.Option(help="yolo, faster_rcnn, yolov3_tiny; else the best that is on the disk")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="a run that trained a detector, or a weights file")] = None,
    conf: Annotated[float | None, typer.Option(help="leave out what is less sure")] = None,
    iou: Annotated[
        float | None, typer.Option(help="of two boxes of a class that overlap more, the surer stays")
    ] = None,
    explain: Annotated[
        str | None, typer.Option(help="grid, anchors or targets: also draw the course's grid; or proposals")
    ] = None,
    save_json: Annotated[bool, typer.Option("--save-json", help="also write all boxes as COCO's JSON")] = False,
    save_txt: Annotated[bool, typer.Option("--save-txt", help="also write each photo's boxes as YOLO's txt")] = False,
    save_xml: Annotated[bool, typer.Option("--save-xml", help="also write each photo's boxes as VOC's XML")] = False,
    set_: SetOption = None,
    device: Device = None,
    runs_dir: RunsDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Find things in photos. `cvlab detect photo.jpg`; without photos, judge the detector by its own validation set."""
    console.set_level(quiet, verbose)
    photos, overrides = split_words(images)
    require_there(photos)
    kinds = {"json": save_json, "txt": save_txt, "xml": save_xml}
    flags: Flags = {"images": photos, "model": model, "weights": weights, "conf": conf, "iou": iou}
    flags |= {
        "explain": explain,
        "save": [kind for kind, wanted in kinds.items() if wanted] or None,
        "set_": set_,
        "device": device,
    }
    start("detect", overrides, flags, runs_dir, dry_run, as_json)
