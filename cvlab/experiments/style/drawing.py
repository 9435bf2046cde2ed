"""Panels, frames and animations of style transfer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from cvlab.experiments.common import saved_images
from cvlab.reports import images
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from cvlab.experiments.style.transfer import StyleTransfer

PANEL_TILE_PX = 640
ANIMATION_PX = 384  # maximum of the longer side


def write_panel(
    run: RunDir, content: Image.Image | None, styles: Sequence[Image.Image], result: Image.Image, names: Sequence[str]
) -> str:
    """Write a panel of the photo, None if there is none, the style images and the result; return its path.

    `names` are the paths of the photo and the style images, for the title.
    """
    captions = ["style"] if len(styles) == 1 else [f"style {k + 1}" for k in range(len(styles))]
    tiles = [("content", content)] if content is not None else []
    tiles += [*zip(captions, styles, strict=True), ("result", result)]
    verb = "style transfer" if content is not None else "texture synthesis"
    title = f"{verb}: {' + '.join(Path(name).name for name in names)}"
    run.write_bytes("images/style-panel.png", images.png(images.panel(tiles, title, max_tile_px=PANEL_TILE_PX)))
    return "images/style-panel.png"


def write_panel_and_animation(transfer: "StyleTransfer", run: RunDir) -> dict[str, str]:
    """Write a panel of all images and an animation of the intermediate ones; return their paths."""
    result = saved_images.load(run, "images/style.png")
    names = [name for name in (transfer.config.content, *transfer.config.styles) if name is not None]
    panel = write_panel(run, transfer.content, transfer.targets.styles, result, names)
    frames = [frame for _, frame in saved_images.load_frames(run, "")]
    size = tuple(max(1, round(side * min(1, ANIMATION_PX / max(result.size)))) for side in result.size)
    run.write_bytes("images/style.gif", images.gif([frame.resize(size) for frame in frames]))  # type: ignore[arg-type]
    return {"panel": panel, "animation": "images/style.gif"}


def save_frame(run: RunDir, image: Image.Image, step: int) -> None:
    """Save an intermediate image as a frame, and as the latest preview."""
    data = images.png(image)
    saved_images.save_frame(run, "", step, data)
    run.write_bytes("images/preview.png", data)
