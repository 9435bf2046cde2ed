"""Adversarial patches: a picture to print that makes the model predict a class wherever it lies in a photo."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.config.metrics import Metric
from cvlab.config.validation import Problems
from cvlab.experiments.adversarial.config import PatchConfig
from cvlab.experiments.base import PhotoExperiment
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cvlab.engine.device import ComputeContext
    from cvlab.experiments.adversarial.photo_set import PhotoSet
    from cvlab.models.pretrained import PretrainedClassifier

PATCH, PANEL = "images/patch.png", "images/panel.png"
PATCH_FRACTION = 0.5  # of the model's input: side in pixels at which the patch is optimized
NUM_SHOWN = 3  # photos in the panel


class PatchExperiment(PhotoExperiment[PatchConfig]):
    """A printable patch that makes the model predict a class, evaluated at random places in photos that were held out.

    References:
        Brown et al., 2017, "Adversarial patch".

    Differences from the paper:
        The patch is a disk, optimized with Adam. It is saved at its printed size, read back and pasted into the photos
        by Pillow. Light, perspective and the camera are not simulated.

    Metrics:
        `success_rate`, `held_out_success_rate`: share of random placements after which the target is predicted, in the
        photos that it was optimized on and in those that were held out. Photos of the target class are left out.
        `width_px`: side of the saved patch.

    Command:
        cvlab attack photos/ --method patch --target toaster
    """

    name = "adversarial_patch"
    Config = PatchConfig
    columns = (
        Column("target", "target"),
        Column("success_rate", "success, photos used"),
        Column("held_out_success_rate", "success, held out"),
        Column("size_mm", "printed size", "mm"),
        Column("dpi", "resolution", "dpi", is_detail=True),
        Column("panel", "panel", is_file=True),
    )
    metrics = (
        Metric("num_photos"),
        Metric("num_held_out"),
        Metric("success_rate", "fraction", "higher"),
        Metric("held_out_success_rate", "fraction", "higher"),
        Metric("width_px", "px"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        Metric("loss", better="lower"),
    )

    def problems(self, config: PatchConfig, base: Path) -> Problems:
        """Return what is wrong with a configuration; also classes that the model does not have."""
        return super().problems(config, base) + config.class_problems("target", [config.target])

    def plan(self, config: PatchConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown class."""
        from cvlab.experiments.common import photo_batches

        ctx, model = config.build()
        target = model.classes[model.class_index(config.target)]
        return {
            "target": target,
            "steps": config.steps,
            "width_px": config.width_px,
            **photo_batches.plan(config, ctx, model),
        }

    def run(self, config: PatchConfig, run: RunDir) -> dict[str, float]:
        """Optimize the patch, save it, read it back and evaluate it."""
        import torch

        from cvlab.data import rng
        from cvlab.engine import image_optimizer
        from cvlab.engine.image_optimizer import ImageState
        from cvlab.engine.loop import Losses
        from cvlab.experiments.adversarial import photo_set
        from cvlab.ops import linf_attacks, patch

        ctx, model = config.build()
        target = model.class_index(config.target)
        photos = photo_set.load(config, model, ctx, target, run)
        sampler = rng.BatchSampler(config.seed, len(photos.used), config.batch_size, torch.device("cpu"))
        size = round(PATCH_FRACTION * model.transform.size_px)
        mask = patch.disk(size).to(ctx.device)

        def objective(state: ImageState) -> Losses:
            numbers = photos.used[sampler(state.step)[1]]
            placements = _placements(config, state.step, len(numbers), "patch")
            images = patch.place(photos.batch(numbers, ctx.device), state.tensors[0], mask, placements)
            with ctx.autocast():
                logits = model.module(images.contiguous(memory_format=torch.channels_last))
            classes = torch.full((len(numbers),), target, device=ctx.device)
            return {"loss": linf_attacks.cross_entropy(logits.float(), classes).mean()}

        adam = image_optimizer.adam(lambda step: config.lr * (1 - step / config.steps))

        def update(state: ImageState, gradients: list[torch.Tensor]) -> None:
            adam(state, gradients)
            state.tensors[0] = state.tensors[0].clamp(0, 1)

        initial = torch.full((3, size, size), 0.5, device=ctx.device)
        pixels, losses = photo_set.optimize(config, initial, objective, update, ctx, run)
        saved = _save_and_load(config, run, pixels, mask)
        success = _evaluate(config, model, ctx, photos, saved, target, run)
        rates = {"success_rate": success[photos.used], "held_out_success_rate": success[photos.held_out]}
        values = {name: float(rows.mean()) for name, rows in rates.items()}
        name = model.classes[target]
        row = {"target": name, **values, "size_mm": config.size_mm, "dpi": config.dpi}
        run.extra_summary |= summarize([PhotoResult(PATCH, row, {"panel": PANEL})], self.columns)
        run.extra_summary["headline"] = (
            f"{name} is predicted for {values['held_out_success_rate']:.2f} of the random placements in "
            f"{len(photos.held_out)} photos that were held out, for {values['success_rate']:.2f} of those in the "
            f"{len(photos.used)} photos that it was optimized on"
        )
        counts = {"num_photos": len(photos.used), "num_held_out": len(photos.held_out), "width_px": saved.width}
        return {**counts, **values, **losses}


def _placements(config: PatchConfig, step: int, count: int, stream: str) -> list[Any]:
    """Return random placements that depend on the seed and the step."""
    import torch

    from cvlab.data import rng
    from cvlab.ops import patch

    uniform = rng.uniform(config.seed, step, torch.arange(4 * count), stream).view(count, 4).tolist()
    return [patch.random_placement(row, config.min_scale, config.max_scale, config.rotate_degrees) for row in uniform]


def _save_and_load(config: PatchConfig, run: RunDir, pixels: "Tensor", mask: "Tensor") -> "Image.Image":
    """Save a patch (3, P, P) on white at its printed size, with the resolution in the file; return what was saved."""
    from PIL import Image

    from cvlab.data import photos
    from cvlab.experiments.common import saved_images
    from cvlab.ops import patch
    from cvlab.reports import images

    size = (config.width_px, config.width_px)
    large = photos.to_image(pixels).resize(size, Image.Resampling.BICUBIC)
    printed = Image.new("RGB", size, "white")
    printed.paste(large, mask=_gray(patch.disk(config.width_px)))
    run.folder("images")
    run.write_bytes(PATCH, images.png(printed, {"dpi": (config.dpi, config.dpi)}))
    return saved_images.load(run, PATCH)


def _gray(mask: "Tensor") -> "Image.Image":
    from PIL import Image

    levels: Any = mask.mul(255).round().byte().numpy()
    return Image.fromarray(levels)


def _evaluate(
    config: PatchConfig,
    model: "PretrainedClassifier",
    ctx: "ComputeContext",
    photos: "PhotoSet",
    printed: "Image.Image",
    target: int,
    run: RunDir,
) -> "Tensor":
    """Return the share of the random placements after which each photo is the target, (N,); save the panel."""
    import torch

    from cvlab.experiments.adversarial import photo_set
    from cvlab.ops import patch
    from cvlab.reports import images

    mask = _gray(patch.disk(printed.width))
    tiles = [(f"{config.size_mm:g} mm at {config.dpi} dpi", printed)]
    success = torch.zeros(len(photos.inputs))
    for k, image in enumerate(photos.inputs):
        placements = _placements(config, k, config.placements, "evaluation of the patch")
        pasted = [patch.paste(image, printed, mask, placement) for placement in placements]
        predicted = photo_set.predict(model, pasted, ctx, config.batch_size)
        success[k] = predicted.eq(target).float().mean()
        if k in photos.held_out[:NUM_SHOWN].tolist():
            tiles.append((f"{model.classes[photos.labels[k]]} becomes {model.classes[predicted[0]]}", pasted[0]))
    title = f"patch for {model.classes[target]}, at random places in photos that were held out"
    run.write_bytes(PANEL, images.png(images.panel(tiles, title)))
    return success
