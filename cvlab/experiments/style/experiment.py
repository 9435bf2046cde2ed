"""Neural style transfer: match the features of a photo and the Gram matrices of one or more style images.

References:     Gatys, Ecker and Bethge, 2016, "Image style transfer using convolutional neural networks"; Gatys et
al., 2017,     "Controlling perceptual factors in neural style transfer" (regions, colors, coarse to fine). Without a
photo it is     texture synthesis (Gatys et al., 2015).

Differences from the papers:     Losses are normalized, so that weights mean the same for every model: the loss of
each style layer starts at its     weight; the content loss is its weight if only the channel means match. `scaling:
absolute` uses the weights as the     papers do.

Metrics:     `content_loss`, `style_loss`, `tv_loss`: the weighted losses of the saved image.     `style_drop`: style
loss of the initial image divided by that of the result.     `ssim`: structural similarity of its luminance to that of
the photo.

Command:     cvlab style tubingen.jpg starry_night.jpg
"""

from pathlib import Path
from typing import Any

from PIL import Image

from cvlab.config.metrics import Metric
from cvlab.data import photos
from cvlab.engine import image_optimizer
from cvlab.experiments.base import Experiment
from cvlab.experiments.style.config import StyleConfig
from cvlab.experiments.style.transfer import StyleTransfer, prepare
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

ANIMATION_PX = 384  # longer side
COLUMNS = (
    Column("style_drop", "style loss reduction"),
    Column("ssim", "SSIM with the photo"),
    Column("panel", "panel", is_file=True),
    Column("animation", "animation", is_file=True),
)
LOSSES = ("content_loss", "style_loss", "tv_loss")


def show(config: StyleConfig, transfer: StyleTransfer, out: RunDir) -> dict[str, str]:
    """Write the panel, and the way to the picture as an animation; return their names."""
    result = photos.load(out.path / "images" / "style.png")
    names = (
        ["style"]
        if len(transfer.targets.styles) == 1
        else [f"style {k + 1}" for k in range(len(transfer.targets.styles))]
    )
    tiles = [("content", transfer.content)] if transfer.content is not None else []
    tiles += [*zip(names, transfer.targets.styles, strict=True), ("result", result)]
    out.write_bytes("images/style-panel.png", images.png(images.panel(tiles)))
    frames = [photos.load(path) for path in sorted((out.path / "images" / "frames").glob("*.png"))]
    small = tuple(max(1, round(side * min(1, ANIMATION_PX / max(result.size)))) for side in result.size)
    out.write_bytes("images/style.gif", images.gif([frame.resize(small) for frame in frames]))  # type: ignore[arg-type]
    return {"panel": "images/style-panel.png", "animation": "images/style.gif"}


def keep_frame(out: RunDir, image: Image.Image, step: int) -> None:
    """Write a picture on the way, and as the preview that is always the newest."""
    (out.folder("images") / "frames").mkdir(exist_ok=True)
    data = images.png(image)
    out.write_bytes(f"images/frames/{step:06d}.png", data)
    out.write_bytes("images/preview.png", data)


class StyleExperiment(Experiment[StyleConfig]):
    """Neural style transfer: match the features of a photo and the Gram matrices of one or more style images."""

    name = "style"
    Config = StyleConfig
    metrics = (
        Metric("width", "px"),
        Metric("height", "px"),
        *(Metric(name, better="lower") for name in ("loss", *LOSSES)),
        Metric("style_drop", better="higher"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        Metric("ssim", better="higher", when=lambda config: config.content is not None),
    )

    def run(self, config: StyleConfig, run: RunDir) -> dict[str, float]:
        """Paint the picture."""
        transfer = prepare(config)
        job = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState([transfer.start()]),
            objective=transfer.objective,
            update=transfer.update,
            steps=config.steps,
            ctx=transfer.ctx,
            config_digest=config.digest(),
            frame_steps=frozenset([*range(0, config.steps, config.preview_every), config.steps]),
            save_frame=lambda step, pixels: keep_frame(run, transfer.image(pixels.tensors[0]), step),
        )
        last = image_optimizer.optimize_image(job, run, "style")
        image = transfer.image(job.state.tensors[0])
        run.write_bytes("images/style.png", images.png(image))
        found = transfer.judge(run.path / "images" / "style.png")
        made = show(config, transfer, run)
        values = {"content": config.content, "styles": list(config.styles), **found}
        run.extra_summary |= summarize([PhotoResult("images/style.png", values, made)], COLUMNS)
        times = {name: last[name] for name in ("steps", "seconds_of_steps")}
        return {"width": image.width, "height": image.height, **found, **times}

    def plan(self, config: StyleConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do. DataError for a picture that is not there, ConfigError for one that is too large."""
        transfer = prepare(config)
        last = transfer.scales[-1]
        return {
            "content": config.content,
            "styles": ", ".join(config.styles),
            "scales": ", ".join(f"{s.width} x {s.height} for {s.end - s.start} steps" for s in transfer.scales),
            "parameters": last.width * last.height * (1 if config.keep_colors else 3),
            "steps": config.steps,
            "memory_gb": round(transfer.bytes_needed() / 1e9, 2),
            "model": config.model,
            "style_layers": ", ".join(transfer.layers.style),
            "content_layer": transfer.layers.content if transfer.content is not None else None,
            **transfer.ctx.as_dict(),
        }
