"""Panels, frames and animations of style transfer."""

from pathlib import Path

from PIL import Image

from cvlab.experiments.common import saved_images
from cvlab.experiments.style.transfer import StyleTransfer
from cvlab.reports import images
from cvlab.runs.run_dir import RunDir

PANEL_TILE_PX = 640
ANIMATION_PX = 384  # maximum of the longer side


def write_panel_and_animation(transfer: StyleTransfer, run: RunDir) -> dict[str, str]:
    """Write a panel of all images and an animation of the intermediate ones; return their paths."""
    result = saved_images.load(run, "images/style.png")
    styles = transfer.targets.styles
    captions = ["style"] if len(styles) == 1 else [f"style {k + 1}" for k in range(len(styles))]
    tiles = [("content", transfer.content)] if transfer.content is not None else []
    tiles += [*zip(captions, styles, strict=True), ("result", result)]
    names = [Path(name).name for name in (transfer.config.content, *transfer.config.styles) if name is not None]
    title = f"{'style transfer' if transfer.content is not None else 'texture synthesis'}: {' + '.join(names)}"
    run.write_bytes("images/style-panel.png", images.png(images.panel(tiles, title, max_tile_px=PANEL_TILE_PX)))
    frames = [frame for _, frame in saved_images.load_frames(run, "")]
    size = tuple(max(1, round(side * min(1, ANIMATION_PX / max(result.size)))) for side in result.size)
    run.write_bytes("images/style.gif", images.gif([frame.resize(size) for frame in frames]))  # type: ignore[arg-type]
    return {"panel": "images/style-panel.png", "animation": "images/style.gif"}


def save_frame(run: RunDir, image: Image.Image, step: int) -> None:
    """Save an intermediate image as a frame, and as the latest preview."""
    data = images.png(image)
    saved_images.save_frame(run, "", step, data)
    run.write_bytes("images/preview.png", data)
